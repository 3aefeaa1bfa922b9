"""diffusers' scheduler of continuous-time consistency models, with the interface that the sampler expects.

In TrigFlow, latents move on an arc: cos(t) times the image plus sin(t) times noise (Lu & Song, Simplifying, Stabilizing
and Scaling Continuous-Time Consistency Models, 2024). Sana-Sprint's denoiser is one of flow matching, whose latents
move on a line. As in SanaSprintPipeline, it is given the point on the line in the same direction, and its velocity
there is turned into that on the arc.
"""

from __future__ import annotations

from typing import Any

import torch

from hypergen_sampler.diffusers_module import diffusers

CLASS_NAME = "SCMScheduler"
# Of SanaSprintPipeline: the second of two steps.
_SECOND_OF_TWO = 1.3


class TrigFlow(diffusers.SCMScheduler):  # type: ignore[misc, unused-ignore]  # untyped
    """SCMScheduler whose latents have the scale of the VAE's, and whose timesteps are those of the denoiser."""

    order = 1
    init_noise_sigma = 1.0
    timesteps: torch.Tensor
    angles: torch.Tensor
    """Of the latents before each step, and after the last one."""

    def set_timesteps(self, num_inference_steps: int, device: str = "cpu") -> None:
        """Set the schedule."""
        second = _SECOND_OF_TWO if num_inference_steps == 2 else None
        super().set_timesteps(num_inference_steps, device=device, intermediate_timesteps=second)
        self.angles = self.timesteps
        starts = self.angles[:-1]
        self.timesteps = torch.sin(starts) / (torch.cos(starts) + torch.sin(starts))
        self.set_begin_index(0)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The point on the line between the image (0) and noise (1)."""
        return sample * _length(timestep)

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """The latents between `original` and `noise` at the next step."""
        angle = self.angles[self._next]
        return torch.cos(angle) * original + torch.sin(angle) * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Predict the image, and add new noise to it for the next step."""
        on_line = self.scale_model_input(sample, timestep)
        turned = (1 - 2 * timestep) * on_line + (1 - 2 * timestep + 2 * timestep**2) * model_output
        velocity = turned / _length(timestep)
        angle, following = self.angles[self._next], self.angles[self._next + 1]
        image = torch.cos(angle) * sample - torch.sin(angle) * velocity
        noise = torch.randn(sample.shape, generator=generator)
        self._step_index = self._next + 1
        noisy = torch.cos(following) * image + torch.sin(following) * noise
        return diffusers.schedulers.scheduling_scm.SCMSchedulerOutput(prev_sample=noisy, pred_original_sample=image)

    @property
    def _next(self) -> int:
        index: int = self._begin_index if self._step_index is None else self._step_index
        return index


def _length(timestep: torch.Tensor) -> torch.Tensor:
    """How far the point on the line is from the centre of the arc, whose radius is 1."""
    return torch.sqrt(timestep**2 + (1 - timestep) ** 2)
