"""Initial latents, from noise or from an encoded input image with added noise, and the blending of masked edits.

Follows diffusers' text-to-image, image-to-image and inpainting pipelines, including the order in which they draw random
numbers from an image's generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hypergen_sampler.conditioning import MASKED_IMAGE, Array
from hypergen_sampler.flow import first_step
from hypergen_sampler.request import Architecture, InvalidInputError, Pixels, Request


@dataclass(frozen=True)
class ImagePosterior:
    """The encoded input image: mean and std [C, h, w] of the VAE's posterior."""

    mean: Array
    std: Array


def masked_image_of(request: Request) -> tuple[Pixels, Pixels]:
    """The image [H, W, 3] for an inpainting model, and which of its pixels are kept [H, W]: 1, else 0."""
    size = (request.height, request.width)
    image = np.zeros((*size, 3), np.uint8) if request.image is None else request.image
    kept = np.zeros(size, np.uint8) if request.mask is None else (request.mask < 128).astype(np.uint8)
    return image, kept


@dataclass(frozen=True)
class LatentInit:
    """The source of a request's first latents: their `shape` C, h, w, and the input image, if any."""

    shape: tuple[int, int, int]
    original: ImagePosterior | None = None
    mask: Pixels | None = None
    """[H, W], aligned with the input image; values from 128 are repainted."""
    respaces_timesteps: bool = False
    """How a strength below 1 is applied. True: take the request's number of steps over the remaining part of the
    schedule, as the pipelines of latent consistency models do. False: take only the last steps of the full schedule."""
    is_flow: bool = False
    """Whether the first step of a strength is rounded as diffusers' pipelines of flow matching do."""
    starts_from_mode: bool = False
    """Whether the input image's latents are the mode of its posterior, instead of a sample."""
    interpolates_mask: bool = False
    """How much of a latent pixel a mask repaints. True: as much as it covers of the pixels at its middle, as in
    Flux2KleinInpaintPipeline. False: all of it or nothing, as it covers its top left corner."""
    masked_image: ImagePosterior | None = None
    """For inpainting models: the image without what is repainted, which is all of it if there is no mask."""


@dataclass(frozen=True)
class MaskBlend:
    """Restores the input image outside a mask after every step, with the noise that the next step expects."""

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    """[1, 1, h, w]; 1 is repainted."""

    def apply(self, latents: torch.Tensor, scheduler: Any, next_timestep: torch.Tensor | None) -> torch.Tensor:
        """`latents` with the kept part restored, free of noise if no timestep follows."""
        kept = self.latents
        if next_timestep is not None:
            kept = scheduler.add_noise(kept, self.noise, next_timestep[None])
        return (1 - self.mask) * kept + self.mask * latents


@dataclass(frozen=True)
class Start:
    """The first latents [1, C, h, w], the timesteps that follow, and the blend of a mask.

    Without timesteps the strength leaves no step, and the input image is returned unchanged.
    """

    latents: torch.Tensor
    timesteps: list[torch.Tensor]
    kept: MaskBlend | None = None
    conditions: Mapping[str, Array] = field(default_factory=dict)
    """Inputs of the denoiser [C, h, w] that are this image's own."""


def references_of(
    request: Request, original: ImagePosterior | None, references: Sequence[Array], architecture: Architecture
) -> list[Array]:
    """The latents of all reference images: an image that is inpainted is the first, before the `references` given.

    In some families it is one only where none is given, as in FluxKontextInpaintPipeline.
    """
    if original is None or request.mask is None or (references and architecture.masked_image_yields):
        return [*references]
    return [original.mean, *references]


def initial_latents(request: Request, latent_init: LatentInit, scheduler: Any, generator: torch.Generator) -> Start:
    """Set the scheduler's timesteps, and draw the first latents.

    As in diffusers, noise is drawn on the CPU in float32, with one generator per image.

    Raises:
        InvalidInputError: the scheduler rejects the steps or an input image, or the strength leaves too few steps.
    """
    if latent_init.masked_image is not None:
        return _inpainting_model(request, latent_init, scheduler, generator)
    if latent_init.original is None:
        timesteps = _timesteps(scheduler, request.num_inference_steps)
        noise = torch.randn((1, *latent_init.shape), generator=generator)
        return Start(noise * scheduler.init_noise_sigma, timesteps)
    _check_adds_noise(scheduler)
    if latent_init.mask is None:
        return _image_to_image(request, latent_init, scheduler, generator)
    return _inpainting(request, latent_init, scheduler, generator)


def _check_adds_noise(scheduler: Any) -> None:
    if not hasattr(scheduler, "add_noise"):
        raise InvalidInputError("image", "must be absent, as this scheduler starts from noise alone; name another one")


def _inpainting_model(request: Request, latent_init: LatentInit, scheduler: Any, generator: torch.Generator) -> Start:
    """As diffusers' inpainting pipelines with a UNet of nine channels, which needs no blending.

    Without a mask everything is repainted: an input image then only gives the first latents.
    """
    assert latent_init.masked_image is not None
    timesteps = _last_timesteps(scheduler, request)
    if not timesteps:
        return Start(torch.zeros((1, *latent_init.shape)), [])
    if request.strength == 1.0:
        latents = torch.randn((1, *latent_init.shape), generator=generator) * scheduler.init_noise_sigma
    else:
        _check_adds_noise(scheduler)
        original = _encoded(latent_init, generator)
        noise = torch.randn(original.shape, generator=generator)
        latents = scheduler.add_noise(original, noise, timesteps[0][None])
    masked_image = _latents_of(latent_init.masked_image, latent_init, generator)
    condition = torch.cat([_latent_mask(latent_init), masked_image], dim=1)
    return Start(latents, timesteps, conditions={MASKED_IMAGE: condition[0].numpy()})


def _image_to_image(request: Request, latent_init: LatentInit, scheduler: Any, generator: torch.Generator) -> Start:
    takes_strength = "strength" in inspect.signature(scheduler.set_timesteps).parameters
    if latent_init.respaces_timesteps and takes_strength:
        timesteps = _respaced_timesteps(scheduler, request)
    else:
        timesteps = _last_timesteps(scheduler, request, is_flow=latent_init.is_flow)
    latents = _encoded(latent_init, generator)
    if not timesteps:
        return Start(latents, [])
    noise = torch.randn(latents.shape, generator=generator)
    return Start(scheduler.add_noise(latents, noise, timesteps[0][None]), timesteps)


def _inpainting(request: Request, latent_init: LatentInit, scheduler: Any, generator: torch.Generator) -> Start:
    timesteps = _last_timesteps(scheduler, request, is_flow=latent_init.is_flow)
    latents = _encoded(latent_init, generator)
    if not timesteps:
        return Start(latents, [])
    noise = torch.randn(latents.shape, generator=generator)
    # Keeps the generator in step with diffusers, which also samples the latents of the masked image. Only inpainting
    # models use those.
    if not latent_init.starts_from_mode:
        torch.randn(latents.shape, generator=generator)
    kept = MaskBlend(latents, noise, _latent_mask(latent_init))
    if request.strength == 1.0:
        return Start(noise * scheduler.init_noise_sigma, timesteps, kept)
    return Start(scheduler.add_noise(latents, noise, timesteps[0][None]), timesteps, kept)


def _encoded(latent_init: LatentInit, generator: torch.Generator) -> torch.Tensor:
    """The latents [1, C, h, w] of the input image."""
    assert latent_init.original is not None
    return _latents_of(latent_init.original, latent_init, generator)


def _latents_of(posterior: ImagePosterior, latent_init: LatentInit, generator: torch.Generator) -> torch.Tensor:
    """A sample of a posterior, or its mode."""
    mean, std = torch.from_numpy(posterior.mean)[None], torch.from_numpy(posterior.std)[None]
    if latent_init.starts_from_mode:
        return mean
    return mean + std * torch.randn(mean.shape, generator=generator)


def _latent_mask(latent_init: LatentInit) -> torch.Tensor:
    if latent_init.mask is None:
        return torch.ones((1, 1, *latent_init.shape[1:]))
    covered = torch.from_numpy((latent_init.mask >= 128).astype(np.float32))[None, None]
    mode = "bilinear" if latent_init.interpolates_mask else "nearest"
    return torch.nn.functional.interpolate(covered, size=latent_init.shape[1:], mode=mode)


def _timesteps(scheduler: Any, num_inference_steps: int, **more: Any) -> list[torch.Tensor]:
    try:
        scheduler.set_timesteps(num_inference_steps, device="cpu", **more)
    except ValueError as refusal:
        # LCM and TCD take at most the steps they were distilled from.
        raise InvalidInputError(
            "num_inference_steps", f"the scheduler refuses {num_inference_steps}: {refusal}"
        ) from None
    return list(scheduler.timesteps)


def _last_timesteps(scheduler: Any, request: Request, *, is_flow: bool = False) -> list[torch.Tensor]:
    """As in `get_timesteps` of diffusers' pipelines: the last steps, a fraction of `strength` of them."""
    steps = request.num_inference_steps
    timesteps = _timesteps(scheduler, steps)
    if is_flow:
        first = first_step(steps, request.strength) * scheduler.order
    else:
        first = (steps - min(int(steps * request.strength), steps)) * scheduler.order
    if first >= steps * scheduler.order:
        return []
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def _respaced_timesteps(scheduler: Any, request: Request) -> list[torch.Tensor]:
    """As in LatentConsistencyModelImg2ImgPipeline: all of the request's steps, over a part of the schedule."""
    _timesteps(scheduler, request.num_inference_steps)  # blame too many steps on the steps, not on the strength
    if int(scheduler.config.original_inference_steps * request.strength) == 0:
        return []
    try:
        return _timesteps(scheduler, request.num_inference_steps, strength=request.strength)
    except InvalidInputError:
        raise InvalidInputError(
            "strength", f"must be large enough for {request.num_inference_steps} steps, not {request.strength:g}"
        ) from None
