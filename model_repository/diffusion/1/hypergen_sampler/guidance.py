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


def classifier_free_renormed(negative: torch.Tensor, positive: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, each 2 × 2 patch rescaled to its norm for the prompt, as in QwenImagePipeline."""
    guided = classifier_free(negative, positive, scale)
    return guided * (_patch_norms(positive) / _patch_norms(guided))


def away_from_skipped_layers(
    guided: torch.Tensor, positive: torch.Tensor, skipped: torch.Tensor, scale: float
) -> torch.Tensor:
    """Skip-layer guidance: also away from the output for the prompt without some layers.

    As in StableDiffusion3Pipeline; Hyung et al., Spatiotemporal Skip Guidance, 2024.
    """
    return guided + (positive - skipped) * scale


def classifier_free_with_image(
    neither: torch.Tensor, image: torch.Tensor, both: torch.Tensor, scale: float, image_scale: float
) -> torch.Tensor:
    """Classifier-free guidance by an image and an instruction (Brooks et al., InstructPix2Pix, 2023, section 3.2.1)."""
    return neither + scale * (both - image) + image_scale * (image - neither)


def rescaled(guided: torch.Tensor, positive: torch.Tensor, rescale: float) -> torch.Tensor:
    """The guided output, partly with the deviation of the one for the prompt: diffusers' `rescale_noise_cfg`.

    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023, section 3.4.
    """
    dims = list(range(1, guided.ndim))
    factor = positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return rescale * (guided * factor) + (1 - rescale) * guided


def _patch_norms(output: torch.Tensor) -> torch.Tensor:
    """The norm [1, 1, h, w] over the channels of each 2 × 2 patch."""
    patches = torch.nn.functional.pixel_unshuffle(output, 2)
    norms: torch.Tensor = torch.linalg.vector_norm(patches, dim=1, keepdim=True)
    return norms.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """`combine` maps the outputs [1, C, h, w] for the negative prompt and the prompt, and the scale, to one output.

    `identity` is the scale at which it is the output for the prompt. None if an image never takes a second row: its
    denoiser is given the scale, or takes none. `by_image`: the first row is without the image to edit, too, a row of
    the negative prompt with it follows, and `combine` takes a second scale, that of the image.
    """

    identity: float
    combine: Callable[..., torch.Tensor] | None = None
    by_image: bool = False


GUIDANCE: Mapping[str, Guidance] = {
    "none": Guidance(identity=1.0),
    "embedded": Guidance(identity=1.0),
    "classifier_free": Guidance(identity=1.0, combine=classifier_free),
    "classifier_free_renormed": Guidance(identity=1.0, combine=classifier_free_renormed),
    "classifier_free_with_image": Guidance(identity=1.0, combine=classifier_free_with_image, by_image=True),
    "classifier_free_from_zero": Guidance(identity=0.0, combine=classifier_free_from_zero),
}
