"""The command as a user runs it: another process, its exit code, what it says and what it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .conftest import edit_json, leftovers

EXPORT = Path(__file__).parents[2] / "export"


def environment(**extra: str) -> dict[str, str]:
    # Offline, so that no test depends on the hub.
    return {**os.environ, "PYTHONPATH": str(EXPORT), "HF_HUB_OFFLINE": "1", **extra}


def run(*arguments: object, code: str | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    entry = ["-c", code] if code else ["-m", "hypergen_export"]
    command = [sys.executable, *entry, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**extra), timeout=120, check=False)


def one_line(finished: subprocess.CompletedProcess[str]) -> str:
    """The error that the command ended with."""
    assert finished.returncode == 1, finished.stderr
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("hypergen: ")
    return line


def test_an_up_to_date_export_takes_less_than_a_second(checkpoint_folder: Path, repository_copy: Path) -> None:
    arguments = [checkpoint_folder, "--max-batch-size", "4", "--model-id", "tiny/one", "--output", repository_copy]
    before = os.times()
    finished = run(*arguments)
    after = os.times()
    # Of CPU time: the clock also counts the other tests that run meanwhile.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert finished.returncode == 0
    assert "up to date" in finished.stderr


@pytest.mark.parametrize(("given", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_short_names_of_types_mean_the_long_ones(
    checkpoint_folder: Path, repository_copy: Path, given: str, dtype: str
) -> None:
    finished = run(checkpoint_folder, "--dtype", given, "--output", repository_copy)
    assert finished.returncode == 0, finished.stderr
    assert "reused text_encoder, unet, vae_decoder, vae_encoder" in finished.stderr
    assert f'"dtype": "{dtype}"' in (repository_copy / "hypergen.json").read_text()
    assert f'"model_id": "{checkpoint_folder}"' in (repository_copy / "hypergen.json").read_text()


def test_looking_at_the_command_imports_no_framework() -> None:
    code = "import sys, hypergen_export.cli; print({'torch', 'transformers', 'diffusers', 'onnx'} & sys.modules.keys())"
    assert run(code=code).stdout == "set()\n"


def test_an_unknown_folder(tmp_path: Path) -> None:
    line = one_line(run(tmp_path / "nowhere", "--output", tmp_path / "repository"))
    assert "no such folder" in line
    assert leftovers(tmp_path) == []


def test_a_lora_that_does_not_fit(checkpoint_folder: Path, repository_copy: Path, tmp_path: Path) -> None:
    weights = {f"unet.conv_in.lora_{half}.weight": torch.ones(4, 9, 3, 3) for half in "AB"}
    save_file(weights, tmp_path / "x.safetensors")
    line = one_line(run(checkpoint_folder, "--lora", tmp_path / "x.safetensors", "--output", repository_copy))
    assert line.endswith("x.safetensors: does not fit this model's unet (the weights' shapes differ at conv_in)")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    line = one_line(run("nobody/nothing", "--output", tmp_path / "repository", HF_HOME=str(tmp_path / "home")))
    assert "nobody/nothing" in line
    assert "hub" in line
    assert leftovers(tmp_path) == []


def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    line = one_line(run(tmp_path / "checkpoint", "--output", tmp_path / "repository"))
    assert "not a diffusers pipeline" in line
    assert leftovers(tmp_path) == []


def test_an_unsupported_family(checkpoint_copy: Path, tmp_path: Path) -> None:
    edit_json(checkpoint_copy / "model_index.json", _class_name="CogView4Pipeline")
    line = one_line(run(checkpoint_copy, "--output", tmp_path / "repository"))
    assert "CogView4Pipeline is not supported" in line
    assert leftovers(tmp_path) == []


def test_broken_weights_say_so_quietly_and_leave_nothing(checkpoint_copy: Path, tmp_path: Path) -> None:
    (checkpoint_copy / "text_encoder" / "model.safetensors").write_bytes(b"garbage")
    line = one_line(run(checkpoint_copy, "--output", tmp_path / "repository"))
    assert "text_encoder/model.safetensors: the weights cannot be read (it does not start with" in line
    assert leftovers(tmp_path) == []


def test_a_place_where_nothing_can_be_written(checkpoint_folder: Path) -> None:
    assert "cannot be written" in one_line(run(checkpoint_folder, "--output", "/proc/hypergen"))


def test_a_safety_checker_that_is_not_run_is_reported_before_the_export(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "model_index.json", requires_safety_checker=True)
    said = run(checkpoint_copy, "--output", "/proc/hypergen").stderr.splitlines()
    assert said[0] == (
        f"{checkpoint_copy}: the checkpoint has a safety checker, which is not run: images are not filtered"
    )
    assert "cannot be written" in said[1]


def test_another_folder_is_never_replaced(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    assert "is not an export" in one_line(run(checkpoint_folder, "--output", tmp_path))
    assert leftovers(tmp_path) == ["notes.txt"]


def test_a_missing_package_is_named_with_what_installs_it(checkpoint_folder: Path, tmp_path: Path) -> None:
    # A finder that knows no torch stands for an installation without it.
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'diffusers'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from hypergen_export.cli import export\n"
        "export()"
    )
    line = one_line(run(checkpoint_folder, "--output", tmp_path / "repository", code=code))
    assert "is not installed" in line
    assert "hypergen-triton[export]" in line
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "fp16"], "--dtype float16: openvino supports float32, bfloat16, int8, int8-weights, int4-weights"),
        (["--passport", "off", "--min-psnr", "30"], "--min-psnr: needs the passport that --passport off leaves out"),
        (["--passport-prompts", "prompts"], "--passport-prompts: needs --passport on or --min-psnr"),
        (["--engine", "tensorrt", "--passport", "on"], "hypergen passport DIR --measure --triton-url HOST:PORT"),
        (["--sizes", "64x64"], "--sizes: openvino takes any size"),
        (["--engine", "tensorrt", "--sizes", ""], "--sizes: must be a list of WIDTHxHEIGHT"),
        (["--engine", "tensorrt", "--sizes", "64x64,65x64"], "--sizes: 65x64 does not suit this model"),
        (["--engine", "tensorrt", "--sizes", "64x64,64x2048"], "--sizes: 64x2048 does not suit this model"),
        (["--engine", "tensorrt", "--sizes", ",".join(f"{8 * n}x64" for n in range(8, 25))], "17 sizes"),
    ],
)
def test_options_that_do_not_go_together(
    checkpoint_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in one_line(run(checkpoint_folder, *options, "--output", tmp_path / "repository"))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("option", ["--max-batch-size=0", "--engine=abacus", "--dtype=int3"])
def test_invalid_option_values(checkpoint_folder: Path, tmp_path: Path, option: str) -> None:
    finished = run(checkpoint_folder, option, "--output", tmp_path / "repository")
    assert finished.returncode == 2
    assert option.partition("=")[0] in finished.stderr.splitlines()[-1]
    assert leftovers(tmp_path) == []


def test_an_installation_without_tensorrt_is_told_which_one_it_needs(checkpoint_folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['tensorrt'] = None\nfrom hypergen_export.cli import export\nexport()"
    line = one_line(run(checkpoint_folder, "--engine", "tensorrt", "--output", tmp_path / "repository", code=code))
    assert "tensorrt is not installed" in line
    assert "Triton's own TensorRT release" in line
    assert leftovers(tmp_path) == []


def test_a_machine_without_a_gpu_builds_no_tensorrt_engine(checkpoint_folder: Path, tmp_path: Path) -> None:
    # TensorRT itself stands aside: what is asked here is the driver, with every GPU hidden from it.
    code = (
        "import sys, types; sys.modules['tensorrt'] = types.SimpleNamespace(__version__='11.1')\n"
        "from hypergen_export.cli import export\nexport()"
    )
    arguments = [checkpoint_folder, "--engine", "tensorrt", "--output", tmp_path / "repository"]
    assert "GPU" in one_line(run(*arguments, code=code, CUDA_VISIBLE_DEVICES=""))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(checkpoint_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "hypergen_export", str(checkpoint_folder), "--output", f"{tmp_path}/repository"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    assert "text_encoder: load" in process.stderr.readline()
    assert [name for name in leftovers(tmp_path) if name.endswith(".partial")] != []
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == "hypergen: export interrupted; nothing was written"
    assert leftovers(tmp_path) == []


def test_a_checkpoint_of_the_hubs_cache_needs_no_network(
    checkpoint_folder: Path, repository_copy: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "home" / "hub" / "models--tiny--one"
    shutil.copytree(checkpoint_folder, cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    arguments = ["tiny/one", "--max-batch-size", "4", "--output", repository_copy]
    finished = run(*arguments, HF_HOME=str(tmp_path / "home"))
    assert finished.returncode == 0, finished.stderr
    assert "up to date" in finished.stderr
