"""A LoRA into the weights of a module: W + scale · alpha / rank · up · down, layer by layer.

diffusers' own loader is not asked, as it scales all layers of a file by the alpha and rank of the first.
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
from hypergen_export.errors import BadLoraError

Tensors = Mapping[str, torch.Tensor]

# Other names of a layer's last part: those of diffusers' former attention processors,
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}
# and, of a UNet, those that its authors gave it, by which kohya trains XL.
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
    """What a LoRA does to one layer: its weights in float32 by part, and scale · alpha / rank."""

    parts: Tensors
    factor: float

    def apply(self, layer: torch.nn.Module) -> None:
        """Raises RuntimeError, AttributeError: it is made for a layer of another shape, or with a bias."""
        weight = layer.get_parameter("weight")
        merged = weight + self.factor * self._product(weight.shape)
        if "magnitude" in self.parts:  # DoRA: the length of each output's weights is learnt apart
            norm = torch.linalg.vector_norm(merged.flatten(1), dim=1)
            ratio = self.parts["magnitude"].reshape(norm.shape) / norm
            merged = merged * ratio.reshape(-1, *[1] * (weight.dim() - 1))
        weight.copy_(merged)
        if "bias" in self.parts:
            layer.get_parameter("bias").add_(self.factor * self.parts["bias"])

    def _product(self, shape: torch.Size) -> torch.Tensor:
        """up · down in the layer's shape, with a convolution's kernel in `down` or between the two (CP)."""
        up, kernel = self.parts["up"], self.parts["down"]
        if "mid" in self.parts:
            kernel = torch.einsum("rs...,si->ri...", self.parts["mid"], kernel.flatten(1))
        # A linear layer may be stored as a convolution of one pixel, and the other way round.
        if _without_ones((len(up), *kernel.shape[1:])) != _without_ones(shape):
            raise RuntimeError("another shape")
        return (up.flatten(1) @ kernel.flatten(1)).reshape(shape)


@torch.no_grad()
def merge_lora(name: str, module: torch.nn.Module, lora: Lora) -> None:
    """Add the LoRA's share for the checkpoint's module `name`, times its scale, to the module's weights.

    Raises BadLoraError.
    """
    layers, settings = lora.layers(name), lora.settings(name)
    places = _find_places(name, module, lora)
    tensors = _read(lora)
    for layer, weights in layers.items():
        parts = {part: tensors[weight] for part, weight in weights.items()}
        if not {"down", "up"} <= parts.keys():
            raise BadLoraError(f"{lora.file}: {layer} has no {' and no '.join(sorted({'down', 'up'} - parts.keys()))}")
        try:
            _Change(parts, lora.scale * _scaling(parts, settings, layer)).apply(places[layer])
        except (RuntimeError, AttributeError) as error:
            raise _misfit(name, lora, f"the weights' shapes differ at {layer}") from error


def _read(lora: Lora) -> Tensors:
    """All weights of the file in float32. Raises BadLoraError."""
    try:
        tensors = {weight: tensor.float() for weight, tensor in load_file(lora.file).items()}
    except Exception as error:  # safetensors has an error of its own
        raise BadLoraError(f"{lora.file}: cannot be read ({error})") from error
    for weight, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadLoraError(f"{lora.file}: has non-finite weights ({weight})")
    if not any(_changes(tensors, parts) for module in lora.modules for parts in lora.layers(module).values()):
        raise BadLoraError(f"{lora.file}: changes nothing, for its weights are zero")
    return tensors


def _changes(tensors: Tensors, parts: Mapping[str, str]) -> bool:
    """Whether a layer's weights come out other than they were; a bias or a magnitude is taken to see to that."""
    factors = [tensors[weight] for part, weight in parts.items() if part in ("down", "mid", "up", "alpha")]
    return all(factor.any() for factor in factors) or not {"bias", "magnitude"}.isdisjoint(parts)


def _scaling(parts: Tensors, settings: Mapping[str, Any], layer: str) -> float:
    """alpha / rank: the layer's own alpha, else what peft's settings say of it, else the rank."""
    rank = max(1, len(parts["down"]))
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _find_places(name: str, module: torch.nn.Module, lora: Lora) -> dict[str, torch.nn.Module]:
    """The file's name of a layer -> that layer of the module. Raises BadLoraError."""
    known = {_flat(path): layer for path, layer in module.named_modules() if _has_matrix(layer)}
    known |= {other: known[path] for path in known for other in _other_names(path)}
    known |= {other: known[path] for path, other in _original_names(module, known)}
    layers = list(lora.layers(name))
    strange = [layer for layer in layers if _flat(layer) not in known]
    if len(strange) == len(layers):
        raise _misfit(name, lora, f"it has no layer that the weights are for, such as {strange[0]}")
    if strange:
        raise _misfit(name, lora, f"it lacks {len(strange)} of {len(layers)} layers, such as {strange[0]}")
    places = {layer: known[_flat(layer)] for layer in layers}
    if len(set(places.values())) != len(places):
        raise BadLoraError(f"{lora.file}: holds weights for one layer under two names")
    return places


def _flat(path: str) -> str:
    """As kohya writes a layer's path; transformers calls a text encoder's with or without its first part."""
    return path.replace(".", "_").removeprefix("text_model_")


def _has_matrix(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)


def _other_names(path: str) -> Iterator[str]:
    for ending, other in _PROJECTIONS.items():
        if path.endswith(f"_{ending}"):
            yield path.removesuffix(ending) + other


def _original_names(unet: Any, paths: Iterable[str]) -> list[tuple[str, str]]:
    """Paths of a UNet's layers with the names that its authors gave them; none for another module."""
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
    """A UNet's resnets, attentions and samplers by their paths, with their places in the authors' flat lists."""
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
        if block.upsamplers:  # behind the last layer, in its place
            behind = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks_{number}_upsamplers_0", f"output_blocks_{place - 1}_{behind}"


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A layer's shape without a kernel of one pixel."""
    outputs, inputs, *kernel = shape
    return outputs, inputs, *(side for side in kernel if side != 1)


def _misfit(name: str, lora: Lora, reason: str) -> BadLoraError:
    return BadLoraError(f"{lora.file}: does not fit this model's {name} ({reason})")
