"""What a LoRA file changes, layer by layer: W + scale · alpha / rank · up · down.

diffusers' loader is not used, as it scales all layers of a file by the alpha and rank of the first. Reads the file and
the names of the module's layers; does not need the module itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file

from hypergen_export.checkpoints.layer_paths import flat
from hypergen_export.checkpoints.lora import Lora
from hypergen_export.conversion.layer_names import Names
from hypergen_export.conversion.transformer_names import Rows
from hypergen_export.errors import BadLoraError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Change:
    """A LoRA's change to one layer: its weights in float32 by part, and scale · alpha / rank.

    In the file, the layer may be some `rows` of a larger one, which has `outputs`.
    """

    parts: Tensors
    factor: float
    rows: Rows = ()
    outputs: int = 0

    def factors(self, shape: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """down [r, in, …] and up [out, r] for a layer's weight of this shape; up is multiplied by the factor.

        Raises RuntimeError for a layer of another shape.
        """
        outputs, *inputs = shape
        down, up = self._whole_factors(self.outputs or outputs, inputs)
        return down, self._own(self.factor * up)

    def _whole_factors(self, outputs: int, inputs: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """down and up of the layer in the file."""
        if "hada_w1_a" in self.parts:
            up, down = _hadamard(self.parts)
            return down.reshape(len(down), *inputs), up.reshape(outputs, len(down))
        if "lokr_w1" in self.parts:
            up, down = _kronecker(self.parts)
            return down.reshape(len(down), *inputs), up.reshape(outputs, len(down))
        up, kernel = self.parts["up"], self._kernel()
        # A linear layer may be stored as a 1×1 convolution, and vice versa.
        fits = _without_ones((len(up), *kernel.shape[1:])) == _without_ones((outputs, *inputs))
        if not fits or len(kernel) != up.shape[1]:
            raise RuntimeError("another shape")
        return kernel.reshape(len(kernel), *inputs), up.flatten(1)

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight with the change. Raises RuntimeError for one of another shape."""
        down, up = self.factors(weight.shape)
        merged = weight + (up @ down.flatten(1)).reshape(weight.shape)
        if "magnitude" in self.parts:  # DoRA: the norm of each output's weights is trained separately
            norm = torch.linalg.vector_norm(merged.flatten(1), dim=1)
            ratio = self._own(self.parts["magnitude"].flatten()) / norm
            merged = merged * ratio.reshape(-1, *[1] * (weight.dim() - 1))
        return merged

    @property
    def bias(self) -> torch.Tensor | None:
        """What is added to the layer's bias, if anything."""
        return self.factor * self._own(self.parts["bias"]) if "bias" in self.parts else None

    def scaled(self, scale: float) -> Change:
        """The change at another scale."""
        return replace(self, factor=scale * self.factor)

    def to(self, device: str) -> Change:
        """The change with its weights on a device."""
        return replace(self, parts={part: tensor.to(device) for part, tensor in self.parts.items()})

    def _own(self, outputs: torch.Tensor) -> torch.Tensor:
        """Of values for each output of the layer in the file, those of this layer."""
        return torch.cat([outputs[first:end] for first, end in self.rows]) if self.rows else outputs

    def _kernel(self) -> torch.Tensor:
        """A convolution's kernel is in `down`, or in `mid` (CP decomposition)."""
        if "mid" in self.parts:
            return torch.einsum("rs...,si->ri...", self.parts["mid"], self.parts["down"].flatten(1))
        return self.parts["down"]


def read_weights(lora: Lora) -> Tensors:
    """All weights of the file in float32. Raises BadLoraError."""
    try:
        tensors = {weight: tensor.float() for weight, tensor in load_file(lora.file).items()}
    except Exception as error:  # safetensors raises its own errors
        raise BadLoraError(f"{lora.file}: cannot be read ({error})") from error
    for weight, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadLoraError(f"{lora.file}: the weights are not finite ({weight})")
    if not any(_has_effect(tensors, parts) for module in lora.modules for parts in lora.layers(module).values()):
        raise BadLoraError(f"{lora.file}: has no effect: its weights are zero")
    return tensors


def sketch_weights(lora: Lora) -> Tensors:
    """Tensors of the weights' shapes, of which those of more than one number have no values. Raises BadLoraError."""
    return {
        weight: torch.ones(shape, device="meta" if math.prod(shape) > 1 else "cpu")
        for weight, shape in lora.shapes.items()
    }


def read_changes(
    module: str,
    module_class: str,
    lora: Lora,
    names: Names,
    read: Callable[[Lora], Tensors] = read_weights,
) -> dict[str, Change]:
    """A layer's path -> its change at a scale of 1, for the checkpoint's module; `names` are its `layer_names`.

    Raises BadLoraError.
    """
    if lora.is_for_another(module_class):
        raise does_not_fit(module, lora, "it is for another kind of model")
    settings, tensors = lora.settings(module), read(lora)
    matched = _match_layers(module, names, lora)
    changes: dict[str, Change] = {}
    for layer, weights in lora.layers(module).items():
        parts = {part: tensors[weight] for part, weight in weights.items()}
        if missing := _missing(parts):
            raise BadLoraError(f"{lora.file}: {layer} has no {' and no '.join(missing)}")
        try:
            factor = _scaling(parts, settings, layer)
        except RuntimeError as error:  # an alpha of several numbers
            raise does_not_fit(module, lora, f"the weights' shapes differ at {layer}") from error
        outputs = sum(end - first for rows in matched[layer].values() for first, end in rows)
        changes |= {path: Change(parts, factor, rows, outputs) for path, rows in matched[layer].items()}
    return changes


def _missing(parts: Tensors) -> list[str]:
    """The parts that a layer's change lacks."""
    needed = {"down", "up"}
    if any(part.startswith("hada") for part in parts):
        needed = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    elif any(part.startswith("lokr") for part in parts):
        needed = {"lokr_w1", *({"lokr_w2"} if "lokr_w2" in parts else {"lokr_w2_a", "lokr_w2_b"})}
    return sorted(needed - parts.keys())


def _hadamard(parts: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """up [out, r1 · r2] and down [r1 · r2, in] of a LoHa: (w1_a · w1_b) ⊙ (w2_a · w2_b), without rounding it."""
    up = torch.einsum("or,os->ors", parts["hada_w1_a"], parts["hada_w2_a"]).flatten(1)
    down = torch.einsum("ri,si->rsi", parts["hada_w1_b"].flatten(1), parts["hada_w2_b"].flatten(1)).flatten(0, 1)
    return up, down


def _kronecker(parts: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """up and down of a LoKr: w1 ⊗ w2, where w2 is a product or, if it is whole, its own up or down."""
    first = parts["lokr_w1"]
    if "lokr_w2" in parts:
        whole = parts["lokr_w2"].flatten(1)
        identity = torch.eye(min(whole.shape), device=whole.device)
        second_up, second_down = (identity, whole) if len(whole) <= whole.shape[1] else (whole, identity)
    else:
        second_up, second_down = parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1)
    return torch.kron(first, second_up), torch.kron(torch.eye(first.shape[1], device=first.device), second_down)


def does_not_fit(module: str, lora: Lora, reason: str) -> BadLoraError:
    """The error for a LoRA of another kind of model."""
    return BadLoraError(f"{lora.file}: does not fit this model's {module} ({reason}{lora.made_for})")


def _has_effect(tensors: Tensors, parts: Mapping[str, str]) -> bool:
    """Whether a layer's weights change; a bias or magnitude is assumed to change them."""
    factors = [tensors[weight] for part, weight in parts.items() if part not in ("bias", "magnitude")]
    return all(factor.any() for factor in factors) or not {"bias", "magnitude"}.isdisjoint(parts)


def _scaling(parts: Tensors, settings: Mapping[str, Any], layer: str) -> float:
    """alpha / rank. alpha is the layer's own, else that of peft's settings, else the rank."""
    if "lokr_w2" in parts:  # LyCORIS scales decomposed factors only
        return 1.0
    rank = max(1, len(next(parts[part] for part in ("down", "hada_w1_b", "lokr_w2_b") if part in parts)))
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _match_layers(module: str, names: Names, lora: Lora) -> dict[str, Mapping[str, Rows]]:
    """Layer name in the file -> the module's layers that it stands for. Raises BadLoraError."""
    layers = list(lora.layers(module))
    unmatched = [layer for layer in layers if flat(layer) not in names]
    if len(unmatched) == len(layers):
        raise does_not_fit(module, lora, f"it has none of its layers, for example {unmatched[0]}")
    if unmatched:
        lacking = f"it lacks {len(unmatched)} of {len(layers)} layers, for example {unmatched[0]}"
        raise does_not_fit(module, lora, lacking)
    matched = {layer: names[flat(layer)] for layer in layers}
    paths = [path for each in matched.values() for path in each]
    if len(set(paths)) != len(paths):
        raise BadLoraError(f"{lora.file}: has weights for one layer under two names")
    return matched


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A layer's shape without kernel sides of 1."""
    outputs, inputs, *kernel = shape
    return outputs, inputs, *(side for side in kernel if side != 1)
