"""Merge a LoRA into a module's weights, layer by layer."""

from __future__ import annotations

import torch

from hypergen_export.checkpoints.lora import Lora
from hypergen_export.conversion.layer_names import layer_names
from hypergen_export.conversion.lora_changes import Change, does_not_fit, read_changes
from hypergen_export.conversion.sources import Placeholders


@torch.no_grad()
def merge_lora(name: str, module: torch.nn.Module, lora: Lora, placeholders: Placeholders | None = None) -> None:
    """Add the LoRA's weights for the checkpoint's module `name`, times its scale. Raises BadLoraError."""
    placeholders = placeholders or Placeholders()
    for path, change in read_changes(name, type(module).__name__, lora, layer_names(module)).items():
        try:
            _apply(change.scaled(lora.scale), module.get_submodule(path), placeholders)
        except (RuntimeError, AttributeError) as error:
            raise does_not_fit(name, lora, f"the weights' shapes differ at {path}") from error


def _apply(change: Change, layer: torch.nn.Module, placeholders: Placeholders) -> None:
    """Add the change to the layer's weights, or to the source of a placeholder.

    Raises:
        RuntimeError, AttributeError: the LoRA was made for a layer of another shape, or for one with a bias.
    """
    weight = layer.get_parameter("weight")
    if placeholders.find(weight):
        change.to("meta").merge(weight.to("meta"))  # raises what merging the values would raise later
        placeholders.change(weight, change.merge)
    else:
        weight.copy_(change.merge(weight))
    if change.bias is not None:
        layer.get_parameter("bias").add_(change.bias)
