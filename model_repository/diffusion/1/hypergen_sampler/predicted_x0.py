"""Predicted x0: a scheduler step's estimate of the final latents, which is shown in previews."""

from __future__ import annotations

from typing import Any

import torch

from hypergen_sampler.diffusers_module import diffusers
from hypergen_sampler.flow import FlowMatchEuler


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """The steps after which a preview is shown: evenly spaced, and never the last one."""
    return frozenset(-(-steps * number // (previews + 1)) for number in range(1, previews + 1)) - {steps}


def predicted_x0(
    scheduler: Any, step: Any, timestep: torch.Tensor, model_output: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The clean latents that `model_output` implies for the noisy `sample`, in the scale of the final latents.

    Args:
        scheduler: one of diffusers', right after the step.
        step: what that step returned. If it contains the scheduler's own estimate, that is the result.
        timestep: the timestep of that step.
        model_output: the denoiser's output after guidance.
        sample: the latents before the step.
    """
    for name in ("pred_original_sample", "denoised"):
        if getattr(step, name, None) is not None:
            own: torch.Tensor = getattr(step, name)
            return own
    if isinstance(scheduler, diffusers.CMStochasticIterativeScheduler):
        return _of_consistency_model(scheduler, model_output, sample)
    if isinstance(scheduler, FlowMatchEuler):
        return sample - _last_sigma(scheduler) * model_output
    if isinstance(scheduler, diffusers.EDMDPMSolverMultistepScheduler):
        x0: torch.Tensor = scheduler.precondition_outputs(sample, model_output, _last_sigma(scheduler))
    else:
        x0 = _of_prediction_type(scheduler, timestep, model_output, sample)
    # As in `convert_model_output` of the multistep solvers. Other schedulers with this option return their estimate,
    # or ignore the option (TCD).
    if hasattr(scheduler, "convert_model_output") and scheduler.config.thresholding:
        x0 = scheduler._threshold_sample(x0)
    return x0


def _of_consistency_model(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(_last_sigma(scheduler))
    x0: torch.Tensor = c_out * model_output + c_skip * sample
    return x0.clamp(-1, 1) if scheduler.config.clip_denoised else x0


def _of_prediction_type(
    scheduler: Any, timestep: torch.Tensor, model_output: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Solve sample = alpha * x0 + sigma * noise for x0."""
    alpha, sigma = _alpha_and_sigma(scheduler, timestep)
    # IPNDM has no such option; its equations assume v-prediction.
    match scheduler.config.get("prediction_type", "v_prediction"):
        case "sample":
            return model_output
        case "v_prediction":
            return alpha * sample - sigma * model_output
        case "flow_prediction":
            return sample - sigma * model_output
        case _:
            return (sample - sigma * model_output) / alpha


def _alpha_and_sigma(scheduler: Any, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of x0 and of unit noise in the input latents of the scheduler's last step."""
    if isinstance(scheduler, diffusers.IPNDMScheduler):
        return scheduler.alphas[scheduler.step_index - 1], scheduler.betas[scheduler.step_index - 1]
    if hasattr(scheduler, "sigmas"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(_last_sigma(scheduler))
        return alpha, sigma
    signal = scheduler.alphas_cumprod[timestep]
    return signal**0.5, (1 - signal) ** 0.5


def _last_sigma(scheduler: Any) -> torch.Tensor:
    sigma: torch.Tensor = scheduler.sigmas[scheduler.step_index - 1]
    return sigma
