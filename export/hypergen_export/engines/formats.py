"""The numbers of eight bits that linear layers and convolutions compute with: int8, and fp8 with four exponent bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergen_export.checkpoints.components import FP8, INT8

# Of a layer whose weights or inputs are zero.
_SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class Format:
    """Numbers of eight bits: their type and the largest of them. The smallest is its negation."""

    dtype: torch.dtype
    largest: float

    def scale(self, magnitudes: Tensor) -> Tensor:
        """What one stands for where `magnitudes` are the largest values; in float32, exact in bfloat16."""
        return (magnitudes / self.largest).clamp(min=_SMALLEST_SCALE).bfloat16().float()

    def weight_scales(self, weights: Tensor) -> Tensor:
        """The scale of each output channel [O] of a layer's weights [O, …]."""
        return self.scale(weights.float().abs().flatten(1).amax(1))

    def quantize(self, values: Tensor, scale: Tensor) -> Tensor:
        """The nearest numbers of `dtype`."""
        scaled = (values.float() / scale).clamp(-self.largest, self.largest)
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype)

    def rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        """Values as they are after they were quantised."""
        return self.quantize(values, scale).float() * scale


FORMATS: Mapping[str, Format] = {
    INT8: Format(dtype=torch.int8, largest=127),
    FP8: Format(dtype=torch.float8_e4m3fn, largest=448),
}
