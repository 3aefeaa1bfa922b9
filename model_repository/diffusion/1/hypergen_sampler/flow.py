"""diffusers' scheduler of flow matching, with the interface that the sampler expects of every scheduler.

In flow matching, latents move from noise to the image along straight lines, and the denoiser predicts their velocity
(Lipman et al., 2023; Liu et al., 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hypergen_sampler.diffusers_module import diffusers

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"


class FlowMatchEuler(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc, unused-ignore]  # untyped
    """FlowMatchEulerDiscreteScheduler with the arguments that its family's pipeline passes to `set_timesteps`.

    Set `flow_sigmas` and `flow_shift`, parameters of the model, and the image's `image_tokens` before that call: the
    number of the denoiser's tokens, by which some families shift the schedule.
    """

    order = 1
    init_noise_sigma = 1.0
    flow_sigmas = ""
    flow_shift = ""
    image_tokens = 0

    def set_timesteps(self, num_inference_steps: int, device: str = "cpu") -> None:
        """Set the schedule and its first step."""
        steps = num_inference_steps
        sigmas = np.linspace(1.0, 1 / steps, steps) if self.flow_sigmas == "linear" else None
        match self.flow_shift:
            case "linear":
                mu: float | None = _linear_shift(self.config, self.image_tokens)
            case "empirical":
                mu = _empirical_shift(self.image_tokens, steps)
            case _:
                mu = None
        super().set_timesteps(steps, device=device, sigmas=sigmas, mu=mu)
        self.set_begin_index(0)

    def scale_model_input(self, sample: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """The latents as they are."""
        return sample

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The latents between `original` and `noise` at the next step."""
        noisy: torch.Tensor = self.scale_noise(original, timesteps, noise)
        return noisy


def first_step(steps: int, strength: float) -> int:
    """The step that image-to-image starts with. Unlike other pipelines, those of flow matching round it down."""
    return int(max(steps - min(steps * strength, steps), 0))


def _linear_shift(config: Any, image_tokens: int) -> float:
    """`calculate_shift` of diffusers' pipelines: a line through two numbers of tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    shift: float = config.base_shift + (image_tokens - config.base_image_seq_len) * slope
    return shift


def _empirical_shift(image_tokens: int, steps: int) -> float:
    """`compute_empirical_mu` of Flux2KleinPipeline: lines measured for 10 and 200 steps, interpolated between them."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return at_200 + slope * (steps - 200)
