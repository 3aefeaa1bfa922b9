from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypergen_export.weights import Weights, choose_weights, float32_bytes


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
    chosen = choose_weights(names)
    assert chosen is not None
    assert chosen.files == expected


def test_a_folder_without_weights_gives_none() -> None:
    assert choose_weights(["config.json", "openvino_model.bin", "flax_model.msgpack"]) is None


def test_half_precision_counts_double_since_the_export_is_in_float32(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    weights = Weights(files=("model.safetensors",), format="safetensors", variant="")
    assert float32_bytes(tmp_path, weights) == (15 + 2) * 4


def test_a_broken_header_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    weights = Weights(files=("model.safetensors",), format="safetensors", variant="")
    assert float32_bytes(tmp_path, weights) == 0
