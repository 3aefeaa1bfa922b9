from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypergen_export.checkpoints.weights import Weights, float32_bytes, select_weights, weight_file_problem


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ("model.safetensors",)),
        (["model.fp16.safetensors", "model.safetensors"], ("model.safetensors",)),
        (["model.fp16.safetensors", "pytorch_model.bin"], ("model.fp16.safetensors",)),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"], ("diffusion_pytorch_model.bin",)),
        (
            ["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            ("diffusion_pytorch_model.fp16.safetensors",),
        ),
        (
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model.fp16.safetensors",
            ],
            (
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.json",
            ),
        ),
        (
            ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"],
            ("model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"),
        ),
        (["openvino_model.bin", "flax_model.msgpack", "model.onnx", "model.safetensors"], ("model.safetensors",)),
    ],
)
def test_the_best_complete_set_is_chosen(names: list[str], expected: tuple[str, ...]) -> None:
    chosen = select_weights(names)
    assert chosen is not None
    assert chosen.files == expected


def test_a_folder_without_weights_gives_none() -> None:
    assert select_weights(["config.json", "openvino_model.bin", "flax_model.msgpack"]) is None


def test_half_precision_counts_double_since_the_export_is_in_float32(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    weights = Weights(files=("model.safetensors",), format="safetensors", variant="")
    assert float32_bytes(tmp_path, weights) == (15 + 2) * 4


def test_a_broken_header_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    weights = Weights(files=("model.safetensors",), format="safetensors", variant="")
    assert float32_bytes(tmp_path, weights) == 0


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
NOT_FOUND = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuchKey</Code></Error>'


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is empty"),
        (POINTER, "it is a git-LFS pointer: run 'git lfs pull' in its folder"),
        (PAGE, "it is a web page"),
        (NOT_FOUND, "it is a web page"),
    ],
)
def test_a_file_without_weights_is_reported_for_what_it_is(
    name: str, content: bytes, fault: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert weight_file_problem(tmp_path / name).startswith(fault)


def test_truncated_safetensors_are_detected_by_their_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(300)}, path)
    assert weight_file_problem(path) == ""
    path.write_bytes(path.read_bytes()[:-200])
    assert weight_file_problem(path) == "it is truncated: 1,000 of 1,200 bytes of weights"


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip archive", (2).to_bytes(8, "little") + b"[]"])
def test_a_file_of_another_format_is_not_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "header" in weight_file_problem(tmp_path / "model.safetensors")
