"""Example tensors for a component: what it is traced with and what it is compared on.

Values are seeded, so that every export compares the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.embeddings import get_timestep_embedding

from hypergen_export.checkpoints.components import Component, Sizes, Tensor


@dataclass(frozen=True)
class _Request:
    """What an example is made from."""

    shape: tuple[int, ...]
    sizes: Sizes
    generator: torch.Generator


def _normal(request: _Request) -> torch.Tensor:
    return torch.randn(request.shape, generator=request.generator)


def _prompt(vocabulary: str, request: _Request) -> torch.Tensor:
    """Random words, then the end token up to the last position, as a tokenizer pads; another length per sample.

    CLIP's pooled output is that of the first end token, which is the last of its vocabulary.
    """
    batch, tokens = request.shape
    end = request.sizes[vocabulary] - 1
    ids = torch.randint(0, end, request.shape, generator=request.generator, dtype=torch.int32)
    for row in range(batch):
        ids[row, 1 + row % (tokens - 1) :] = end
    return ids


def _time(request: _Request) -> torch.Tensor:
    # Another timestep per sample: a model that shared one over the batch would be noticed.
    batch, width = request.shape
    timesteps = torch.linspace(1.0, 999.0, batch + 1)[1:]
    embedding: torch.Tensor = get_timestep_embedding(timesteps, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedding


def _sinusoids(request: _Request) -> torch.Tensor:
    return torch.sin(torch.rand(request.shape, generator=request.generator) * 2 * math.pi)


def _pixel(request: _Request) -> torch.Tensor:
    return torch.randint(0, 256, request.shape, generator=request.generator, dtype=torch.uint8)


VALUES: Mapping[str, Callable[[_Request], torch.Tensor]] = {
    "normal": _normal,
    "prompt": partial(_prompt, "vocabulary"),
    "prompt_2": partial(_prompt, "vocabulary_2"),
    "time": _time,
    "sinusoids": _sinusoids,
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


def by_name(component: Component, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The inputs as a wrapper's keyword arguments: which ones a UNet takes differs from family to family."""
    return {tensor.name: value for tensor, value in zip(component.inputs, inputs, strict=True)}
