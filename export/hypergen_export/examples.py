"""Example tensors for a component: what it is traced with and what it is compared on.

Values are seeded, so that every export compares the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hypergen_export.components import Component, Sizes, Tensor


@dataclass(frozen=True)
class _Request:
    """What an example is made from."""

    shape: tuple[int, ...]
    sizes: Sizes
    generator: torch.Generator


def _normal(request: _Request) -> torch.Tensor:
    return torch.randn(request.shape, generator=request.generator)


def _token(request: _Request) -> torch.Tensor:
    vocabulary = request.sizes["vocabulary"]
    return torch.randint(0, vocabulary, request.shape, generator=request.generator, dtype=torch.int32)


def _timestep(request: _Request) -> torch.Tensor:
    # Another one per sample: a model that shared one over the batch would be noticed.
    return torch.linspace(1.0, 999.0, request.shape[0] + 1)[1:].expand(request.shape).clone()


def _pixel(request: _Request) -> torch.Tensor:
    return torch.randint(0, 256, request.shape, generator=request.generator, dtype=torch.uint8)


VALUES: Mapping[str, Callable[[_Request], torch.Tensor]] = {
    "normal": _normal,
    "token": _token,
    "timestep": _timestep,
    "pixel": _pixel,
}


def example_inputs(
    component: Component, sizes: Sizes, *, batch: int, height: int, width: int
) -> tuple[torch.Tensor, ...]:
    """The component's inputs for `batch` samples whose latents are `height` × `width`, in the table's order."""
    generator = torch.Generator().manual_seed(batch * 10_000 + height * 100 + width)

    def fill(tensor: Tensor) -> torch.Tensor:
        shape = tensor.shape(sizes, batch=batch, height=height, width=width)
        return VALUES[tensor.example](_Request(shape, sizes, generator))

    return tuple(fill(tensor) for tensor in component.inputs)
