"""The denoising trajectory of one image: the mathematics of its steps, without batching or the denoiser itself.

Follows `__call__` of diffusers' pipelines step for step, so that the same weights, seed and scheduler give the same
latents.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypergen_sampler.conditioning import DEEP_FEATURES, HIDDEN_STATES, MODEL_OUTPUT, SKIP, Array, Conditioning
from hypergen_sampler.guidance import GUIDANCE, away_from_skipped_layers, rescaled
from hypergen_sampler.latent_init import LatentInit, initial_latents
from hypergen_sampler.predicted_x0 import predicted_x0, preview_steps
from hypergen_sampler.references import REFERENCES
from hypergen_sampler.request import Architecture, NonFiniteError, Request
from hypergen_sampler.schedulers import step_arguments


@dataclass(frozen=True)
class DenoiserInputs:
    """The rows that one image adds to a batch: [R, C, h, w], [R] and [R, …].

    R is 1, in a guided step 2, and 3 in one that is also guided by an image or away from skipped layers.

    `model` is the denoiser's name in Triton, `outputs` are the outputs to request from it.
    """

    model: str
    sample: Array
    timestep: Array
    conditions: Conditioning
    outputs: tuple[str, ...] = (MODEL_OUTPUT,)


class Trajectory:
    """The latents of one image, and the scheduler that advances them from noise to the final ones.

    Args:
        request: its `seed` must already be this image's own.
        conditions: the denoiser's inputs beside latents and timestep, each with the rows of a guided step.
        latent_init: the source of the initial latents.
        scheduler: one of diffusers', not shared with other images.
        architecture: names the component that takes the steps and the kind of guidance.

    Raises:
        InvalidInputError: the scheduler rejects the steps or an input image, or the strength leaves too few steps.
    """

    def __init__(
        self,
        request: Request,
        conditions: Conditioning,
        latent_init: LatentInit,
        scheduler: Any,
        architecture: Architecture,
    ) -> None:
        self.steps_done = 0
        self._denoiser = architecture.denoiser
        self._max_reference_rows = architecture.max_reference_rows
        self._guidance = GUIDANCE[architecture.guidance]
        self._loras = request.loras
        self._cache_interval = request.cache_interval
        self._deep_features: Array | None = None
        self._guidance_scales = [request.guidance_scale, request.image_guidance_scale][: 1 + self._guidance.by_image]
        self._guidance_rescale = request.guidance_rescale
        self._scheduler = scheduler
        generator = torch.Generator("cpu").manual_seed(request.seed)
        start = initial_latents(request, latent_init, self._scheduler, generator)
        self._latents, self._timesteps, self._mask_blend = start.latents, start.timesteps, start.kept
        rows = len(conditions[HIDDEN_STATES])
        own = {name: np.repeat(array[None], rows, axis=0) for name, array in start.conditions.items()}
        self._conditions = {**conditions, **own}
        self._extra = step_arguments(self._scheduler, generator, request.eta)
        self._guided_steps = steps_between(request.guidance_start, request.guidance_end, self.steps)
        self._skip_scale = request.skip_layer_guidance_scale
        self._skipping_steps = steps_within(
            request.skip_layer_guidance_start, request.skip_layer_guidance_stop, self.steps if self._skip_scale else 0
        )
        self._preview_steps = preview_steps(self.steps, request.partial_images)
        self._preview: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of a denoiser batch that the next step takes."""
        if self.steps_done not in self._guided_steps:
            return 1
        guided = len(self._conditions[HIDDEN_STATES])
        return guided + 1 if guided > 1 and self.steps_done in self._skipping_steps else guided

    @property
    def max_rows(self) -> int | None:
        """Rows of a denoiser call with this image, if fewer than usual."""
        has_references = REFERENCES in self._conditions and self._conditions[REFERENCES].shape[1] > 0
        return self._max_reference_rows if has_references else None

    @property
    def model(self) -> str:
        """The model that takes the next step."""
        return self._loras.model(self._denoiser if self._reused is None else f"{self._denoiser}_shallow")

    @property
    def _reused(self) -> Array | None:
        """The deep features that the next step reuses, if any; they must contain all its rows."""
        kept = self._deep_features
        if self.steps_done % self._cache_interval == 0 or kept is None or len(kept) < self.rows:
            return None
        return kept

    @property
    def batch_key(self) -> Hashable:
        """The next step's model and the shapes of its inputs: only images whose keys are equal can share a batch."""
        # Deep features have a shape of their own, which follows from the model and that of the latents.
        conditions = tuple((name, array.shape[1:]) for name, array in self._conditions.items())
        return self.model, self._latents.shape[1:], conditions

    @property
    def steps(self) -> int:
        """Denoiser calls that the whole trajectory takes."""
        return len(self._timesteps)

    @property
    def finished(self) -> bool:
        return self.steps_done == self.steps

    @property
    def latents(self) -> Array:
        """[C, h, w], as the scheduler left them (not yet divided by the VAE's scaling factor)."""
        return _to_array(self._latents)

    @property
    def preview(self) -> Array | None:
        """[C, h, w], predicted x0 of the last step; None if no preview is due after it."""
        return None if self._preview is None else _to_array(self._preview)

    def denoiser_inputs(self) -> DenoiserInputs:
        """The denoiser's inputs for the next step."""
        timestep = self._timesteps[self.steps_done]
        scaled = self._scheduler.scale_model_input(self._latents, timestep).numpy()
        rows, reused = self.rows, self._reused
        conditions = self._conditions if reused is None else {**self._conditions, DEEP_FEATURES: reused}
        are_kept = reused is None and self._cache_interval > 1
        return DenoiserInputs(
            model=self.model,
            sample=np.concatenate([scaled] * rows),
            timestep=np.full(rows, float(timestep), dtype=np.float32),
            conditions={name: _rows_of(name, array, rows) for name, array in conditions.items()},
            outputs=(MODEL_OUTPUT, DEEP_FEATURES) if are_kept else (MODEL_OUTPUT,),
        )

    def advance(self, outputs: Mapping[str, Array]) -> None:
        """Take one step of the scheduler with the denoiser's outputs for `denoiser_inputs`, each [R, C, h, w].

        Raises:
            NonFiniteError: the latents became infinite or NaN, from which no later step recovers.
        """
        if self._cache_interval > 1 and DEEP_FEATURES in outputs:
            # Copied out of Triton's memory, without the rows of other images.
            self._deep_features = outputs[DEEP_FEATURES].copy()
        guided = self._guide(torch.from_numpy(outputs[MODEL_OUTPUT]))
        timestep, sample = self._timesteps[self.steps_done], self._latents
        step = self._scheduler.step(guided, timestep, sample, **self._extra)
        self.steps_done += 1
        if not step.prev_sample.isfinite().all():
            raise NonFiniteError(f"not finite: the latents after step {self.steps_done} of {self.steps}")
        self._latents = self._blend_mask(step.prev_sample, None if self.finished else self._timesteps[self.steps_done])
        self._preview = None
        if self.steps_done in self._preview_steps:
            self._preview = self._blend_mask(predicted_x0(self._scheduler, step, timestep, guided, sample), None)

    def _guide(self, output: torch.Tensor) -> torch.Tensor:
        if len(output) == 1:
            return output
        assert self._guidance.combine is not None
        rows = len(self._conditions[HIDDEN_STATES])
        guided: torch.Tensor = self._guidance.combine(*output[:rows].split(1), *self._guidance_scales)
        positive, skipped = output[rows - 1 : rows], output[rows:]
        if len(skipped):
            guided = away_from_skipped_layers(guided, positive, skipped, self._skip_scale)
        return rescaled(guided, positive, self._guidance_rescale) if self._guidance_rescale else guided

    def _blend_mask(self, latents: torch.Tensor, next_timestep: torch.Tensor | None) -> torch.Tensor:
        return latents if self._mask_blend is None else self._mask_blend.apply(latents, self._scheduler, next_timestep)


def steps_between(start: float, end: float, steps: int) -> range:
    """The steps between two fractions of all steps, counted as in diffusers' guiders.

    Rounds first, so that 0.7 of 10 steps is 7, although the product in float32 is slightly less.
    """
    return range(int(round(start * steps, 3)), int(round(end * steps, 3)))


def steps_within(start: float, stop: float, steps: int) -> range:
    """The steps that lie strictly between two fractions of all steps, as StableDiffusion3Pipeline counts them."""
    return range(math.floor(round(start * steps, 3)) + 1, math.ceil(round(stop * steps, 3)))


def _rows_of(name: str, array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """The rows of a condition for a step of so many: without guidance that of the prompt, which is the last.

    The third row is that of the prompt again, and skips layers.
    """
    if rows <= len(array):
        return array[-rows:]
    return np.concatenate([array, np.ones_like(array[-1:]) if name == SKIP else array[-1:]])


def _to_array(latents: torch.Tensor) -> Array:
    return np.asarray(latents[0].numpy(), dtype=np.float32)
