"""The command line: what it generates without a server, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from support.running_server import HYPERGEN, Server, free_port, generate_all, pixels_of, start_server, stop_server


def hypergen(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HYPERGEN, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    """What the command said before it failed; a traceback fails the test."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("Error: ", "hypergen: "))]
    return line


def test_generate_generates_the_same_image_for_the_same_seed(server: Server, tmp_path: Path) -> None:
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in files:
        options = ["--seed", "5", "--size", "96x64", "--triton-url", server.triton_url]
        result = hypergen("generate", "cat", "-o", str(file), *options)
        assert result.returncode == 0, result.stderr
        assert "96x64, seed 5" in result.stdout
    one, two = (np.asarray(Image.open(file)) for file in files)
    assert one.shape == (64, 96, 3)
    assert np.array_equal(one, two)


def test_generate_knows_the_schedulers_of_the_webui_as_the_api_does(server: Server, tmp_path: Path) -> None:
    file, name = tmp_path / "cat.png", "DPM++ 2M Karras"
    options = ["--scheduler", name, "--seed", "5", "--triton-url", server.triton_url]
    result = hypergen("generate", "cat", "-o", str(file), *options)
    assert result.returncode == 0, result.stderr
    bodies = [{"prompt": "cat", "seed": 5, "scheduler": scheduler} for scheduler in (name, "dpmpp_2m")]
    same, plain = asyncio.run(generate_all(server, bodies))
    assert np.array_equal(np.asarray(Image.open(file)), same)
    assert not np.array_equal(same, plain)


def test_generate_starts_a_triton_of_its_own(checkpoint: Path, cache_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    options = ["--model", str(checkpoint), "--cache-dir", str(cache_dir), "--dtype", "float32", "--steps", "3"]
    result = hypergen("generate", "cat", "-o", str(file), *options)
    assert result.returncode == 0, result.stderr
    with Image.open(file) as opened:
        assert opened.size == (64, 64)


def test_a_passport_compares_the_images_of_two_tritons(
    server: Server, client: openai.OpenAI, exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("a cat\na dog\n")
    repository = tmp_path / "repository"
    shutil.copytree(exported, repository)
    options = ["--measure", "--triton-url", server.triton_url, "--reference-url", server.triton_url]
    options += ["--prompts", str(tmp_path / "prompts"), "--with", "num_inference_steps=3", "--cache-dir", str(tmp_path)]
    result = hypergen("passport", str(repository), *options)
    assert result.returncode == 0, result.stderr

    as_served, fewer = json.loads((repository / "passport.json").read_text())["settings"]
    assert [(image["psnr"], image["latents_error"]) for image in as_served["images"]] == [(100, 0)] * 2
    for seed, (prompt, image) in enumerate(zip(["a cat", "a dog"], fewer["images"], strict=True)):
        all_steps, three = (
            pixels_of(client.images.generate(prompt=prompt, extra_body={"seed": seed, **fields}).data[0])  # type: ignore[index]
            for fields in ({}, {"num_inference_steps": 3})
        )
        error = np.square(all_steps.astype(float) - three).mean()
        assert image["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
        assert image["latents_error"] > 0.01
    assert hypergen("passport", str(repository)).stdout == result.stdout


def test_an_export_is_measured_before_it_is_in_place(
    checkpoint: Path, exported: Path, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("a cat\n")
    output = exported.with_name("measured")
    options = ["--output", str(output), "--cache-dir", str(cache_dir), "--min-psnr", "100"]
    options += ["--passport-prompts", str(tmp_path / "prompts")]
    result = hypergen("export", str(checkpoint), *options, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert "| as served |    100.0 |  100.0 | 1.0000 | 1.0000 |" in result.stderr
    assert (output / "passport.json").is_file()


def test_a_size_that_the_model_cannot_generate_is_said_in_one_line(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    result = hypergen("generate", "cat", "-o", str(file), "--size", "65x64", "--triton-url", server.triton_url)
    assert "size" in one_line_error(result)
    assert not file.exists()


def test_a_busy_port_is_said_in_one_line(server: Server) -> None:
    result = hypergen("serve", "--host", "127.0.0.1", "--port", str(server.port))
    assert f"127.0.0.1:{server.port}" in one_line_error(result)


def test_an_unknown_model_is_said_in_one_line(tmp_path: Path) -> None:
    result = hypergen("serve", str(tmp_path / "nothing"), "--port", str(free_port()), "--cache-dir", str(tmp_path))
    assert "nothing" in one_line_error(result)


def test_engines_that_need_a_gpu_are_refused_with_what_runs_them(tmp_path: Path) -> None:
    for file in ("diffusion/config.pbtxt", "unet/1/model.plan"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    line = one_line_error(hypergen("serve", str(tmp_path), "--port", str(free_port())))
    assert "TensorRT" in line
    assert f"tritonserver --model-repository={tmp_path}" in line
    assert "--triton-url" in line


def test_of_an_export_that_does_not_load_the_folder_to_remove_is_said(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / exported.name
    shutil.copytree(exported, damaged)
    engine = damaged / "unet" / "1" / "model.onnx"
    engine.write_bytes(bytes(255 - byte for byte in engine.read_bytes()))
    options = ["--cache-dir", str(tmp_path), "--dtype", "float32", "--port", str(free_port())]
    line = one_line_error(hypergen("serve", str(checkpoint), *options))
    assert f"{engine} cannot be loaded by OpenVINO" in line
    assert f"remove {damaged}" in line


def test_a_cache_that_cannot_be_written_is_said_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = hypergen("serve", str(checkpoint), "--port", str(free_port()), "--cache-dir", str(tmp_path / "file" / "x"))
    assert one_line_error(result)


def test_generate_without_the_triton_it_was_told_is_one_line(tmp_path: Path) -> None:
    url = f"127.0.0.1:{free_port()}"
    assert url in one_line_error(hypergen("generate", "cat", "-o", str(tmp_path / "cat.png"), "--triton-url", url))


def test_a_gateway_may_start_before_its_triton() -> None:
    server = start_server("--triton-url", f"127.0.0.1:{free_port()}", model="", key=None, ready=False)
    try:
        assert server.health()["status"] == "unhealthy"
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "cat"}, timeout=30)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert answer.json()["error"]["message"]
    finally:
        assert stop_server(server) == 0


@pytest.mark.parametrize("option", ["--device=cuda", "--dtype=float16", "--api-key="])
def test_what_the_embedded_server_cannot_do_is_refused(option: str) -> None:
    assert one_line_error(hypergen("serve", option))


def test_every_option_of_serve_is_an_environment_variable() -> None:
    help_text = hypergen("serve", "--help").stdout
    for name in ("HOST", "PORT", "API_KEY", "DTYPE", "DEVICE", "LORA", "MAX_QUEUE_SIZE", "MAX_BATCH_SIZE", "RELOAD"):
        assert f"HYPERGEN_{name}" in help_text
    result = hypergen("serve", HYPERGEN_DEVICE="cuda")
    assert "CPU" in one_line_error(result)
