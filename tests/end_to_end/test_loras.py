"""LoRAs beside the checkpoint as it is, through the real Triton, against diffusers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository
from support.loras import lora_weights, save_by_diffusers, save_by_kohya
from support.pipelines import pipeline_of
from support.running_server import KEY, Pixels, Server, generate, generate_all, start_server, stop_server

# Of 255, as in test_parity and test_batching.
TOLERANCE = 0.1
LARGEST_DIFFERENCE = 1
WISH: dict[str, Any] = {"prompt": "a red rocket", "num_inference_steps": 8, "guidance_scale": 3.0}


@dataclass(frozen=True)
class Files:
    """`ink` changes UNet and text encoder, `words` the text encoder alone."""

    ink: Path
    words: Path


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("loras")
    return Files(
        ink=save_by_diffusers(folder / "ink", lora_weights(checkpoint, "unet", "text_encoder")),
        words=save_by_kohya(folder / "words.safetensors", lora_weights(checkpoint, "text_encoder", seed=8), alpha=4.0),
    )


@pytest.fixture(scope="module")
def loras(files: Files) -> tuple[str, ...]:
    """With a name and a scale, and without either."""
    return f"ink={files.ink}:0.5", str(files.words)


@pytest.fixture(scope="module")
def repository(checkpoint: Path, exported: Path, cache_dir: Path, loras: tuple[str, ...]) -> Path:
    """Where the server finds it: an export takes longer than a start may."""
    assert exported.parent == cache_dir
    options = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=cache_dir, loras=loras)
    return asyncio.run(find_repository(str(checkpoint), options))


@pytest.fixture(scope="module")
def server(checkpoint: Path, repository: Path, loras: tuple[str, ...]) -> Iterator[Server]:
    given = [word for lora in loras for word in ("--lora", lora)]
    running = start_server("--dtype", "float32", "--cache-dir", str(repository.parent), *given, model=str(checkpoint))
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


def by_diffusers(checkpoint: Path, file: Path, scale: float, fields: dict[str, Any]) -> Pixels:
    pipeline = pipeline_of(checkpoint)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=scale)
    given = {name: value for name, value in fields.items() if name != "seed"}
    return np.asarray(pipeline(**given, generator=torch.Generator().manual_seed(fields["seed"])).images[0])


def differences(ours: Pixels, theirs: Pixels) -> Any:
    return np.abs(ours.astype(int) - theirs.astype(int))


def test_the_server_says_at_its_start_which_loras_it_has(server: Server) -> None:
    (line,) = [line for line in server.lines if line.startswith("Serving ")]
    assert line.endswith("(cpu, with an API key, with the LoRA ink at 0.5, with the LoRA words at 1)")


def test_only_what_the_loras_change_takes_room_again(repository: Path, exported: Path) -> None:
    own = {"text_encoder.ink@0.5", "unet.ink@0.5", "text_encoder.words@1"}
    base = {folder.name for folder in exported.iterdir() if (folder / "1" / "model.onnx").exists()}
    assert {folder.name for folder in repository.iterdir() if (folder / "1" / "model.onnx").exists()} == base | own
    assert all((repository / name / "1" / "model.onnx").samefile(exported / name / "1" / "model.onnx") for name in base)


async def test_images_equal_load_lora_weights_and_fuse_lora_of_diffusers(
    server: Server, checkpoint: Path, files: Files
) -> None:
    async with server.async_client() as client:
        plain = await generate(client, **WISH, seed=5)
        for name, file, scale in (("ink", files.ink, 0.5), ("words", files.words, 1.0)):
            ours = await generate(client, **WISH, seed=5, lora_path=name)
            found = differences(ours, by_diffusers(checkpoint, file, scale, WISH | {"seed": 5}))
            print(f"{name}: mean difference {found.mean():.4f}/255, largest {found.max()}/255; ", end="")
            print(f"to the checkpoint as it is {differences(ours, plain).mean():.1f}/255")
            assert found.mean() <= TOLERANCE
            assert differences(ours, plain).mean() > 1


async def test_a_scale_of_0_is_the_checkpoint_as_it_is(server: Server) -> None:
    async with server.async_client() as client:
        plain = await generate(client, **WISH, seed=6)
        assert np.array_equal(plain, await generate(client, **WISH, seed=6, lora_path="ink", lora_scale=0))


async def test_requests_with_different_loras_at_once_give_the_images_that_each_gives_alone(server: Server) -> None:
    loras: list[dict[str, Any]] = [
        {},
        {"lora_path": "ink"},
        {"lora_path": "words"},
        {"lora_path": "ink", "lora_scale": 0.5},
        {},
    ]
    # DDIM calls the UNet once a step; the steps are many, so that late requests meet the first ones too.
    steps = 100
    same = {**WISH, "num_inference_steps": steps, "scheduler": "ddim"}
    bodies = [{**same, "seed": seed, **lora} for seed, lora in enumerate(loras)]
    async with server.async_client() as client:
        alone = [await generate(client, **fields) for fields in bodies]
    before = [server.counts_of(model) for model in ("unet", "unet.ink@0.5")]
    together = await generate_all(server, bodies)
    after = [server.counts_of(model) for model in ("unet", "unet.ink@0.5")]
    assert max(differences(*pair).max() for pair in zip(alone, together, strict=True)) <= LARGEST_DIFFERENCE
    rows, executions = zip(*[(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)], strict=True)
    print(f"{rows} rows in {executions} executions of the UNet without and with the LoRA")
    # Two rows a step and image: three images without a LoRA in their UNet, two with one.
    assert rows == (3 * steps * 2, 2 * steps * 2)
    assert executions[0] < 3 * steps
    assert executions[1] < 2 * steps


def test_what_is_not_there_is_refused_with_what_is(server: Server) -> None:
    with server.client() as client:
        for fields, param, message in (
            ({"lora_path": "oil"}, "lora_path", "It must be one of 'ink', 'words'."),
            ({"lora_path": "ink", "lora_scale": 1.0}, "lora_scale", "'ink' is served at 0.5; 0 disables it."),
        ):
            with pytest.raises(openai.BadRequestError, match=message) as refused:
                client.images.generate(prompt="cat", extra_body=fields)
            assert refused.value.param == param


def test_there_is_still_one_model(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert [model["id"] for model in answer["data"]] == [server.model]
