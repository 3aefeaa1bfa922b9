"""Kinds of guidance: how many denoiser rows an image takes, and how their outputs are combined.

The names are the values of the parameter `guidance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


def classifier_free(negative: torch.Tensor, positive: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans, 2022)."""
    return negative + scale * (positive - negative)


def classifier_free_from_zero(negative: torch.Tensor, positive: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance whose scale is counted from 0, as in diffusers' ZImagePipeline."""
    return positive + scale * (positive - negative)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """`combine` maps the outputs [1, C, h, w] for the negative prompt and the prompt, and the scale, to one output.

    `identity` is the scale at which it is the output for the prompt. None if an image never takes a second row: its
    denoiser is given the scale, or takes none.
    """

    identity: float
    combine: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None


GUIDANCE: Mapping[str, Guidance] = {
    "none": Guidance(identity=1.0),
    "embedded": Guidance(identity=1.0),
    "classifier_free": Guidance(identity=1.0, combine=classifier_free),
    "classifier_free_from_zero": Guidance(identity=0.0, combine=classifier_free_from_zero),
}
