"""What an image is expected to become: the estimate of its original that every step of a scheduler contains.

Knows diffusers' schedulers; knows neither guidance nor what becomes of an estimate.
"""

from __future__ import annotations

from typing import Any

import torch


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """After which of `steps` steps to look at the image: evenly spaced, and never after the last one."""
    return frozenset(-(-steps * number // (previews + 1)) for number in range(1, previews + 1)) - {steps}


def predicted_original(
    scheduler: Any, step: Any, timestep: torch.Tensor, answer: torch.Tensor, sample: torch.Tensor
) -> Any:
    """The original that the model's `answer` to the noisy `sample` amounts to, in the scale of the final latents.

    Args:
        scheduler: one of diffusers', right after the step.
        step: what that step returned; where it tells the original, or a consistency model's own estimate, that is it.
        timestep: the step's.
        answer: the UNet's, guided.
        sample: the latents before the step.
    """
    for name in ("pred_original_sample", "denoised"):
        if getattr(step, name, None) is not None:
            return getattr(step, name)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return answer
    # sample = alpha * original + sigma * noise; v-prediction is defined where alpha² + sigma² = 1.
    alpha, sigma = _alpha_and_sigma(scheduler, timestep)
    if kind == "v_prediction":
        power = alpha**2 + sigma**2
        return (alpha * sample - sigma * power**0.5 * answer) / power
    return (sample - sigma * answer) / alpha


def _alpha_and_sigma(scheduler: Any, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the original and of unit noise there is in the latents that a scheduler's last step was given."""
    if not hasattr(scheduler, "sigmas"):
        signal = scheduler.alphas_cumprod[timestep]
        return signal**0.5, (1 - signal) ** 0.5
    ratio = scheduler.sigmas[scheduler.step_index - 1]
    # Schedulers that start from unit noise keep the variance; the others add noise to an original of full size.
    alpha = (1 + ratio**2) ** -0.5 if scheduler.init_noise_sigma == 1.0 else torch.ones(())
    return alpha, alpha * ratio
