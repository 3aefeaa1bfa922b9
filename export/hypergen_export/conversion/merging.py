"""Merge a LoRA into a module's weights: W + scale · alpha / rank · up · down, layer by layer.

diffusers' loader is not used, as it scales all layers of a file by the alpha and rank of the first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from hypergen_export.checkpoints.lora import Lora
from hypergen_export.conversion.sources import Placeholders
from hypergen_export.errors import BadLoraError

Tensors = Mapping[str, torch.Tensor]

# Alternative names of a layer's last part, from diffusers' former attention processors.
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}
# Names in the UNet's original implementation, which kohya uses for XL.
_ORIGINAL_PARTS = {
    ("resnets", "conv1"): "in_layers_2",
    ("resnets", "conv2"): "out_layers_3",
    ("resnets", "time_emb_proj"): "emb_layers_1",
    ("resnets", "conv_shortcut"): "skip_connection",
    ("downsamplers", "conv"): "op",
}
_OUTER = {
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}


@dataclass(frozen=True)
class _Change:
    """A LoRA's change to one layer: its weights in float32 by part, and scale · alpha / rank."""

    parts: Tensors
    factor: float

    def apply(self, layer: torch.nn.Module, placeholders: Placeholders) -> None:
        """Add the change to the layer's weights, or to the source of a placeholder.

        Raises:
            RuntimeError, AttributeError: the LoRA was made for a layer of another shape, or for one with a bias.
        """
        weight = layer.get_parameter("weight")
        if placeholders.find(weight):
            on_meta = _Change({part: tensor.to("meta") for part, tensor in self.parts.items()}, self.factor)
            on_meta.merge(weight.to("meta"))  # raises what merging the values would raise later
            placeholders.change(weight, self.merge)
        else:
            weight.copy_(self.merge(weight))
        if "bias" in self.parts:
            layer.get_parameter("bias").add_(self.factor * self.parts["bias"])

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight with the change. Raises RuntimeError for one of another shape."""
        merged = weight + self.factor * self._product(weight.shape)
        if "magnitude" in self.parts:  # DoRA: the norm of each output's weights is trained separately
            norm = torch.linalg.vector_norm(merged.flatten(1), dim=1)
            ratio = self.parts["magnitude"].reshape(norm.shape) / norm
            merged = merged * ratio.reshape(-1, *[1] * (weight.dim() - 1))
        return merged

    def _product(self, shape: torch.Size) -> torch.Tensor:
        """up · down in the layer's shape; a convolution's kernel is in `down`, or in `mid` (CP decomposition)."""
        up, kernel = self.parts["up"], self.parts["down"]
        if "mid" in self.parts:
            kernel = torch.einsum("rs...,si->ri...", self.parts["mid"], kernel.flatten(1))
        # A linear layer may be stored as a 1×1 convolution, and vice versa.
        if _without_ones((len(up), *kernel.shape[1:])) != _without_ones(shape):
            raise RuntimeError("another shape")
        return (up.flatten(1) @ kernel.flatten(1)).reshape(shape)


@torch.no_grad()
def merge_lora(name: str, module: torch.nn.Module, lora: Lora, placeholders: Placeholders | None = None) -> None:
    """Add the LoRA's weights for the checkpoint's module `name`, times its scale. Raises BadLoraError."""
    placeholders = placeholders or Placeholders()
    layers, settings = lora.layers(name), lora.settings(name)
    targets = _match_layers(name, module, lora)
    tensors = _read(lora)
    for layer, weights in layers.items():
        parts = {part: tensors[weight] for part, weight in weights.items()}
        if not {"down", "up"} <= parts.keys():
            raise BadLoraError(f"{lora.file}: {layer} has no {' and no '.join(sorted({'down', 'up'} - parts.keys()))}")
        try:
            _Change(parts, lora.scale * _scaling(parts, settings, layer)).apply(targets[layer], placeholders)
        except (RuntimeError, AttributeError) as error:
            raise _mismatch(name, lora, f"the weights' shapes differ at {layer}") from error


def _read(lora: Lora) -> Tensors:
    """All weights of the file in float32. Raises BadLoraError."""
    try:
        tensors = {weight: tensor.float() for weight, tensor in load_file(lora.file).items()}
    except Exception as error:  # safetensors raises its own errors
        raise BadLoraError(f"{lora.file}: cannot be read ({error})") from error
    for weight, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadLoraError(f"{lora.file}: the weights are not finite ({weight})")
    if not any(_changes(tensors, parts) for module in lora.modules for parts in lora.layers(module).values()):
        raise BadLoraError(f"{lora.file}: has no effect: its weights are zero")
    return tensors


def _changes(tensors: Tensors, parts: Mapping[str, str]) -> bool:
    """Whether a layer's weights change; a bias or magnitude is assumed to change them."""
    factors = [tensors[weight] for part, weight in parts.items() if part in ("down", "mid", "up", "alpha")]
    return all(factor.any() for factor in factors) or not {"bias", "magnitude"}.isdisjoint(parts)


def _scaling(parts: Tensors, settings: Mapping[str, Any], layer: str) -> float:
    """alpha / rank. alpha is the layer's own, else that of peft's settings, else the rank."""
    rank = max(1, len(parts["down"]))
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _match_layers(name: str, module: torch.nn.Module, lora: Lora) -> dict[str, torch.nn.Module]:
    """Layer name in the file -> that layer of the module. Raises BadLoraError."""
    known = {_flat(path): layer for path, layer in module.named_modules() if _has_matrix(layer)}
    known |= {other: known[path] for path in known for other in _other_names(path)}
    known |= {other: known[path] for path, other in _original_names(module, known)}
    layers = list(lora.layers(name))
    unmatched = [layer for layer in layers if _flat(layer) not in known]
    if len(unmatched) == len(layers):
        raise _mismatch(name, lora, f"it has none of its layers, for example {unmatched[0]}")
    if unmatched:
        raise _mismatch(name, lora, f"it lacks {len(unmatched)} of {len(layers)} layers, for example {unmatched[0]}")
    targets = {layer: known[_flat(layer)] for layer in layers}
    if len(set(targets.values())) != len(targets):
        raise BadLoraError(f"{lora.file}: has weights for one layer under two names")
    return targets


def _flat(path: str) -> str:
    """A layer's path as kohya writes it, without the optional prefix of transformers' text encoders."""
    return path.replace(".", "_").removeprefix("text_model_")


def _has_matrix(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)


def _other_names(path: str) -> Iterator[str]:
    for ending, other in _PROJECTIONS.items():
        if path.endswith(f"_{ending}"):
            yield path.removesuffix(ending) + other


def _original_names(unet: Any, paths: Iterable[str]) -> list[tuple[str, str]]:
    """Paths of a UNet's layers and their names in the original implementation; empty for other modules."""
    if not hasattr(unet, "down_blocks"):
        return []
    blocks = dict(_original_blocks(unet))
    names = [(path, _OUTER[path]) for path in paths if path in _OUTER]
    for path in paths:
        for block, original in blocks.items():
            if path.startswith(f"{block}_"):
                part = path.removeprefix(f"{block}_")
                kind = block.split("_")[-2]
                names.append((path, f"{original}_{_ORIGINAL_PARTS.get((kind, part), part)}"))
    return names


def _original_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """A UNet's resnets, attentions and samplers by path, with their names in the original flat lists of blocks."""
    place = 1  # after conv_in
    for number, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield f"down_blocks_{number}_resnets_{layer}", f"input_blocks_{place}_0"
            yield f"down_blocks_{number}_attentions_{layer}", f"input_blocks_{place}_1"
            place += 1
        if block.downsamplers:
            yield f"down_blocks_{number}_downsamplers_0", f"input_blocks_{place}_0"
            place += 1
    yield from (("mid_block_resnets_0", "middle_block_0"), ("mid_block_attentions_0", "middle_block_1"))
    yield "mid_block_resnets_1", "middle_block_2"
    place = 0
    for number, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            yield f"up_blocks_{number}_resnets_{layer}", f"output_blocks_{place}_0"
            yield f"up_blocks_{number}_attentions_{layer}", f"output_blocks_{place}_1"
            place += 1
        if block.upsamplers:  # has the index of the last layer, which it follows
            behind = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks_{number}_upsamplers_0", f"output_blocks_{place - 1}_{behind}"


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A layer's shape without kernel sides of 1."""
    outputs, inputs, *kernel = shape
    return outputs, inputs, *(side for side in kernel if side != 1)


def _mismatch(name: str, lora: Lora, reason: str) -> BadLoraError:
    return BadLoraError(f"{lora.file}: does not fit this model's {name} ({reason})")
