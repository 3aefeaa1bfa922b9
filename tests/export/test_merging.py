"""A merged LoRA against those who made its formats: diffusers' pipeline, and peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from hypergen_export.checkpoint import Checkpoint
from hypergen_export.errors import BadLoraError
from hypergen_export.loading import load_module
from hypergen_export.lora import read_loras
from hypergen_export.merging import merge_lora
from loras import TARGETS, Weights, lora_weights, save_by_diffusers, save_by_kohya, save_by_peft
from pipelines import pipeline_of

from .conftest import COMPONENTS

MODULES = ("unet", "text_encoder")
SCALE = 0.5
Layers = dict[str, Weights]


@pytest.fixture(scope="module")
def weights(checkpoint_folder: Path) -> Layers:
    return lora_weights(checkpoint_folder, *MODULES)


def merged(checkpoint: Checkpoint, name: str, file: Path) -> dict[str, torch.Tensor]:
    """The module's weights with the LoRA."""
    module = load_module(checkpoint, COMPONENTS[name])
    (lora,) = read_loras([f"{file}:{SCALE}"])
    merge_lora(checkpoint, name, module, lora)
    return module.state_dict()


def held(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """The same numbers under the same names, and others than without the LoRA."""
    assert ours.keys() == theirs.keys() == base.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(not torch.equal(ours[name], base[name]) for name in ours) >= 10


def by_diffusers(folder: Path, weights: Layers) -> Path:
    return save_by_diffusers(folder / "diffusers", weights)


def by_diffusers_with_alpha(folder: Path, weights: Layers) -> Path:
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS["unet"]}
    return save_by_diffusers(folder / "alpha", {"unet": weights["unet"]}, **config)


def by_kohya(folder: Path, weights: Layers) -> Path:
    return save_by_kohya(folder / "kohya.safetensors", weights, alpha=2.0)


@pytest.mark.parametrize("save", [by_diffusers, by_diffusers_with_alpha, by_kohya])
def test_merging_equals_load_lora_weights_and_fuse_lora(
    save: Callable[[Path, Layers], Path],
    weights: Layers,
    checkpoint: Checkpoint,
    checkpoint_folder: Path,
    tmp_path: Path,
) -> None:
    file = save(tmp_path, weights)
    pipeline = pipeline_of(checkpoint_folder)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    for name in read_loras([str(file)])[0].modules:
        base = load_module(checkpoint, COMPONENTS[name]).state_dict()
        held(merged(checkpoint, name, file), getattr(pipeline, name).state_dict(), base)


def test_merging_what_peft_alone_wrote_equals_its_own(
    checkpoint: Checkpoint, checkpoint_folder: Path, tmp_path: Path
) -> None:
    folder = save_by_peft(tmp_path / "peft", checkpoint_folder, alpha=8)
    module: Any = load_module(checkpoint, COMPONENTS["unet"])
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    theirs: Any = PeftModel.from_pretrained(module, str(folder))
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(SCALE)
    held(merged(checkpoint, "unet", folder), theirs.merge_and_unload().state_dict(), base)


def wider(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, torch.cat([tensor, tensor], dim=1) if "lora_A" in name else tensor


def for_other_layers(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name.replace(".", ".deep_", 1), tensor


def for_more_layers(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name.replace("up_blocks.1", "up_blocks.2").replace("layers.1", "layers.2"), tensor


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (wider, "the weights' shapes differ"),
        (for_other_layers, "it has no layer that the weights are for"),
        (for_more_layers, r"\d+ weights are for it, it has places for \d+"),
    ],
)
def test_a_lora_of_another_architecture_is_refused_in_one_line(
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]],
    problem: str,
    name: str,
    weights: Layers,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    file = save_by_diffusers(tmp_path, {name: dict(change(*item) for item in weights[name].items())})
    with pytest.raises(BadLoraError, match=rf"^{file}: does not fit this model's {name} \({problem}\)$"):
        merged(checkpoint, name, file)
