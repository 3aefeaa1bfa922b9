"""One image on its way from noise to latents: the mathematics of a step, without any batching.

Follows `__call__` of diffusers' pipelines step for step, so that the same weights, seed and scheduler give the same
latents. Knows torch and diffusers; the UNet itself and what it is told of the prompt are somebody else's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conditions import HIDDEN_STATES, Array, Conditions
from contract import InvalidInputError, Request
from samplers import make_scheduler


@dataclass(frozen=True)
class UNetRows:
    """The rows that one image adds to a batch: [R, C, h, w], [R] and [R, …], with R = 2 under guidance, else 1."""

    sample: Array
    timestep: Array
    conditions: Conditions


class Image:
    """The latents of one image and the scheduler that moves them.

    Args:
        request: what to draw; `seed` must already be this image's own.
        conditions: the UNet's inputs beside latents and timestep, each with the R rows of this image.
        latent_shape: C, h, w.
        scheduler_config: the checkpoint's.

    Raises:
        InvalidInputError: the scheduler does not take this number of steps.
    """

    def __init__(
        self,
        request: Request,
        conditions: Conditions,
        latent_shape: tuple[int, int, int],
        scheduler_config: Mapping[str, Any],
    ) -> None:
        self.steps_done = 0
        self._conditions = conditions
        self._guidance_scale = request.guidance_scale
        self._scheduler = make_scheduler(request.scheduler, scheduler_config)
        self._timesteps = _timesteps(self._scheduler, request.num_inference_steps)
        # The noise of diffusers: drawn on the CPU in float32, one generator per image.
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        noise = torch.randn((1, *latent_shape), generator=self._generator)
        self._latents = noise * self._scheduler.init_noise_sigma
        self._extra = _extra_step_arguments(self._scheduler, self._generator)

    @property
    def rows(self) -> int:
        """How many rows of a UNet batch this image needs."""
        return len(self._conditions[HIDDEN_STATES])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents: only equal ones can share a batch."""
        return self._latents.shape[2], self._latents.shape[3]

    @property
    def finished(self) -> bool:
        return self.steps_done == len(self._timesteps)

    @property
    def latents(self) -> Array:
        """[C, h, w], as the scheduler left them (not yet divided by the VAE's scaling factor)."""
        return np.asarray(self._latents[0].numpy(), dtype=np.float32)

    def unet_rows(self) -> UNetRows:
        """The input of this image's next step."""
        timestep = self._timesteps[self.steps_done]
        scaled = self._scheduler.scale_model_input(self._latents, timestep).numpy()
        return UNetRows(
            sample=np.repeat(scaled, self.rows, axis=0),
            timestep=np.full(self.rows, float(timestep), dtype=np.float32),
            conditions=self._conditions,
        )

    def advance(self, model_output: Array) -> None:
        """Take one step of the scheduler with the UNet's answer [R, C, h, w] to `unet_rows`."""
        guided = self._guide(torch.from_numpy(model_output))
        timestep = self._timesteps[self.steps_done]
        self._latents = self._scheduler.step(guided, timestep, self._latents, return_dict=False, **self._extra)[0]
        self.steps_done += 1

    def _guide(self, output: torch.Tensor) -> torch.Tensor:
        if self.rows == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self._guidance_scale * (conditional - unconditional)


def _timesteps(scheduler: Any, num_inference_steps: int) -> list[torch.Tensor]:
    try:
        scheduler.set_timesteps(num_inference_steps, device="cpu")
    except ValueError as refusal:
        # LCM and TCD take at most the steps they were distilled from.
        raise InvalidInputError(
            "num_inference_steps", f"the scheduler refuses {num_inference_steps}: {refusal}"
        ) from None
    return list(scheduler.timesteps)


def _extra_step_arguments(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """As diffusers' `prepare_extra_step_kwargs`, with its default eta of 0: only what this `step` accepts."""
    offered = {"eta": 0.0, "generator": generator}
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in accepted}
