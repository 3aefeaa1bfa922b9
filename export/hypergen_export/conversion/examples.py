"""Example inputs of a component, for tracing and for comparison with torch.

Values are seeded, so every export compares the same numbers.
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
class _Spec:
    """Shape and random generator of an example tensor."""

    shape: tuple[int, ...]
    sizes: Sizes
    generator: torch.Generator


def _normal(spec: _Spec) -> torch.Tensor:
    return torch.randn(spec.shape, generator=spec.generator)


def _prompt(vocabulary: str, spec: _Spec) -> torch.Tensor:
    """Random tokens, then end tokens up to the last position, as a tokenizer pads; each sample has its own length.

    CLIP pools at the first end token, which is the last of its vocabulary.
    """
    batch, tokens = spec.shape
    end = spec.sizes[vocabulary] - 1
    ids = torch.randint(0, end, spec.shape, generator=spec.generator, dtype=torch.int32)
    for row in range(batch):
        ids[row, 1 + row % (tokens - 1) :] = end
    return ids


def _mask(spec: _Spec) -> torch.Tensor:
    """Each sample has its own number of tokens, at least one; padding follows."""
    batch, tokens = spec.shape
    lengths = torch.tensor([1 + (5 + 13 * row) % tokens for row in range(batch)])
    return (torch.arange(tokens)[None] < lengths[:, None]).to(torch.int32)


def _instructed_mask(spec: _Spec) -> torch.Tensor:
    """Samples with an instruction before the prompt, and every second one padded to its place; padding follows."""
    first = (spec.shape[1] - spec.sizes["tokens"]) * (torch.arange(spec.shape[0]) % 2)
    last = first + spec.sizes["tokens"] // 2 + 7 * torch.arange(spec.shape[0])
    index = torch.arange(spec.shape[1])[None]
    return ((first[:, None] <= index) & (index < last[:, None])).to(torch.int32)


def _clip_skip(spec: _Spec) -> torch.Tensor:
    """Each sample skips another number of layers, the first none."""
    numbers = torch.arange(spec.shape[0], dtype=torch.int32) % (spec.sizes["max_clip_skip"] + 1)
    return numbers[:, None]


def _time(spec: _Spec) -> torch.Tensor:
    # Each sample has its own timestep, to detect a model that shares one across the batch.
    batch, width = spec.shape
    timesteps = torch.linspace(1.0, 999.0, batch + 1)[1:]
    embedding: torch.Tensor = get_timestep_embedding(timesteps, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedding


def _reference_positions(spec: _Spec) -> torch.Tensor:
    """Two images, the second one a column of tokens, in rows of five."""
    tokens = torch.arange(spec.shape[1])
    half = (tokens >= spec.shape[1] // 2).to(tokens.dtype)
    positions = torch.stack([10 + 10 * half, tokens // (5 - 4 * half), tokens % (5 - 4 * half)], dim=-1)
    return positions.to(torch.int32).repeat(spec.shape[0], 1, 1)


def _sinusoids(spec: _Spec) -> torch.Tensor:
    return torch.sin(torch.rand(spec.shape, generator=spec.generator) * 2 * math.pi)


def _pixel(spec: _Spec) -> torch.Tensor:
    return torch.randint(0, 256, spec.shape, generator=spec.generator, dtype=torch.uint8)


def _kept(spec: _Spec) -> torch.Tensor:
    return torch.randint(0, 2, spec.shape, generator=spec.generator, dtype=torch.uint8)


def _skip(spec: _Spec) -> torch.Tensor:
    """Every second sample skips layers."""
    return (torch.arange(spec.shape[0], dtype=torch.int32) % 2)[:, None]


VALUES: Mapping[str, Callable[[_Spec], torch.Tensor]] = {
    "normal": _normal,
    "prompt": partial(_prompt, "vocabulary"),
    "prompt_2": partial(_prompt, "vocabulary_2"),
    "prompt_3": partial(_prompt, "vocabulary_3"),
    "mask": _mask,
    "instructed_mask": _instructed_mask,
    "clip_skip": _clip_skip,
    "time": _time,
    "sinusoids": _sinusoids,
    "reference_positions": _reference_positions,
    "pixel": _pixel,
    "kept": _kept,
    "skip": _skip,
}


def example_inputs(  # noqa: PLR0913 - the free axes
    component: Component,
    sizes: Sizes,
    *,
    batch: int,
    height: int,
    width: int,
    text_tokens: int | None = None,
    reference_tokens: int = 0,
) -> tuple[torch.Tensor, ...]:
    """The component's inputs for `batch` samples, in the component's order.

    The latents are `height` × `width` of the denoiser's tokens; prompts have `text_tokens` and reference images
    `reference_tokens` where their number is free.
    """
    generator = torch.Generator().manual_seed(batch * 10_000 + height * 100 + width)
    patch = sizes.get("patch_size", 1)

    def fill(tensor: Tensor) -> torch.Tensor:
        shape = tensor.shape(
            sizes,
            batch=batch,
            height=height * patch,
            width=width * patch,
            text_tokens=text_tokens,
            reference_tokens=reference_tokens,
        )
        return VALUES[tensor.example](_Spec(shape, sizes, generator))

    return tuple(fill(tensor) for tensor in component.inputs)


def as_kwargs(component: Component, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The inputs as the wrapper's keyword arguments; a denoiser's differ between families."""
    return {tensor.name: value for tensor, value in zip(component.inputs, inputs, strict=True)}
