"""Previews against closed forms, for every scheduler that is served."""

from __future__ import annotations

import dataclasses
import functools
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hypergen_sampler.latent_init import LatentInit
from hypergen_sampler.predicted_x0 import predicted_x0, preview_steps
from hypergen_sampler.request import Request
from hypergen_sampler.sampling import DenoiserInputs, Trajectory
from hypergen_sampler.schedulers import Schedulers
from support.architectures import architecture_of
from support.scheduler_tables import CLASSES, SERVED, own_scheduler_of, schedulers_of

CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "original_inference_steps": 50,
}
RANDOM = np.random.default_rng(3)
ORIGINAL = RANDOM.normal(size=(1, 4, 6, 5)).astype(np.float32)
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)
# Of the largest value. The sigmas of Karras lie between the timesteps, and the UNet is told the nearest of these.
TOLERANCE = {"dpmpp_2m_karras": 2e-3}
NOT_IN_DIFFUSERS = {("pndm", "sample"), ("euler_a", "sample")}
STEPS = 9
REQUEST = Request(
    prompt="x",
    negative_prompt=None,
    num_images=1,
    width=40,
    height=48,
    num_inference_steps=STEPS,
    guidance_scale=1.0,
    scheduler="",
    seed=4,
)


@functools.cache
def schedulers_predicting(prediction_type: str) -> Schedulers:
    """Made once, as all of them are tried: each image gets a scheduler of its own from them."""
    return schedulers_of(CONFIG | {"prediction_type": prediction_type})


def image_of(scheduler: str, prediction_type: str, guidance_scale: float) -> Trajectory:
    request = dataclasses.replace(REQUEST, guidance_scale=guidance_scale, scheduler=scheduler, partial_images=3)
    states = np.zeros((2 if guidance_scale > 1 else 1, 1, 1), dtype=np.float32)
    made = schedulers_predicting(prediction_type).make(scheduler, steps=STEPS)
    return Trajectory(request, {"encoder_hidden_states": states}, LatentInit((4, 6, 5)), made, architecture_of())


def answer_of_one_who_knows(image: Trajectory, prediction_type: str, guidance_scale: float) -> Any:
    """The model output [R, C, h, w] that is right for ORIGINAL: of two rows, neither is, but their guided sum."""
    rows = image.denoiser_inputs()
    noise_ratio = np.interp(rows.timestep[0], np.arange(1000), ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD) ** 0.5)
    alpha, sigma = (1 + noise_ratio**2) ** -0.5, noise_ratio * (1 + noise_ratio**2) ** -0.5
    noise = (rows.sample[:1] - alpha * ORIGINAL) / sigma
    right = {"epsilon": noise, "v_prediction": alpha * noise - sigma * ORIGINAL, "sample": ORIGINAL}[prediction_type]
    if guidance_scale == 1:
        return right.astype(np.float32)
    unconditional = np.ones_like(right)
    return np.concatenate([unconditional, unconditional + (right - unconditional) / guidance_scale]).astype(np.float32)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    sorted(set(product(CLASSES, ("epsilon", "v_prediction", "sample"))) - NOT_IN_DIFFUSERS),
)
def test_every_preview_is_the_original_that_the_unet_means(
    scheduler: str, prediction_type: str, guidance_scale: float
) -> None:
    image = image_of(scheduler, prediction_type, guidance_scale)
    previews = []
    while not image.finished:
        answer = answer_of_one_who_knows(image, prediction_type, guidance_scale)
        image.advance({"model_output": answer})
        if image.preview is not None:
            previews.append((image.steps_done, image.preview))
    largest = np.abs(ORIGINAL).max()
    errors = [float(np.abs(preview - ORIGINAL[0]).max() / largest) for _, preview in previews]
    print(scheduler, prediction_type, [f"{error:.1e}" for error in errors])
    assert len(previews) == 3
    assert max(errors) <= TOLERANCE.get(scheduler, 1e-5)


# A checkpoint's own scheduler by its class. The inverse ones lead away from the original.
INVERSE = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")
MULTISTEP = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
EDM_HAS_NO_FLOW = {("EDMDPMSolverMultistepScheduler", "flow_prediction")}
# Of the largest value: some leave a little noise after the last step. IPNDM extrapolates its last step, too.
FINAL_TOLERANCE = {"IPNDMScheduler": 0.4}
# Options by which a class alters outputs or the noise schedule of its own accord.
UNALTERED = {"clip_denoised": False, "snr_shift_scale": 1.0}


def stepping_image(scheduler: Any) -> Trajectory:
    """An image that shows a preview after every step but the last."""
    request = dataclasses.replace(REQUEST, num_inference_steps=STEPS, partial_images=STEPS - 1)
    states = np.zeros((1, 1, 1), dtype=np.float32)
    return Trajectory(request, {"encoder_hidden_states": states}, LatentInit((4, 6, 5)), scheduler, architecture_of())


def knowing_output(scheduler: Any, rows: DenoiserInputs) -> Any:
    """The output [1, C, h, w] of a denoiser that knows ORIGINAL, by the paper that the scheduler follows."""
    x, t, config = rows.sample.astype(np.float64), float(rows.timestep[0]), scheduler.config
    kind = type(scheduler).__name__
    if kind == "IPNDMScheduler":  # its time is an angle, and it predicts velocities
        alpha, sigma = np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)
        return (alpha * x - ORIGINAL) / sigma
    if kind == "CMStochasticIterativeScheduler":  # Song et al., 2023, appendix C
        sigma, data = np.exp(t / 250), config.sigma_data
        c_skip = data**2 / ((sigma - config.sigma_min) ** 2 + data**2)
        c_out = (sigma - config.sigma_min) * data / (sigma**2 + data**2) ** 0.5
        return (ORIGINAL - c_skip * x * (sigma**2 + data**2) ** 0.5) / c_out
    if kind.startswith("EDM"):  # Karras et al., 2022, table 1
        sigma, data = np.exp(4 * t), config.sigma_data
        c_out = sigma * data / (sigma**2 + data**2) ** 0.5 * (-1 if config.prediction_type == "v_prediction" else 1)
        return (ORIGINAL - data**2 / (sigma**2 + data**2) ** 0.5 * x) / c_out
    ratio = np.interp(t, np.arange(1000), ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD) ** 0.5)
    alpha, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
    noise = (x - alpha * ORIGINAL) / sigma
    return noise if config.prediction_type == "epsilon" else alpha * noise - sigma * ORIGINAL


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("class_name", [name for name in SERVED if name not in INVERSE])
def test_every_preview_by_any_class_is_the_original_that_the_denoiser_means(
    class_name: str, prediction_type: str
) -> None:
    config = CONFIG | {"_class_name": class_name, "prediction_type": prediction_type} | UNALTERED
    scheduler = own_scheduler_of(config, STEPS)
    image = stepping_image(scheduler)
    errors = []
    while not image.finished:
        image.advance({"model_output": knowing_output(scheduler, image.denoiser_inputs()).astype(np.float32)})
        if image.preview is not None:
            errors.append(float(np.abs(image.preview - ORIGINAL[0]).max() / np.abs(ORIGINAL).max()))
    last = float(np.abs(image.latents - ORIGINAL[0]).max() / np.abs(ORIGINAL).max())
    print(class_name, prediction_type, [f"{error:.1e}" for error in errors], f"{last:.1e}")
    assert len(errors) >= STEPS - 1
    assert max(errors) <= 2e-5
    assert last <= FINAL_TOLERANCE.get(class_name, 0.03), "the output is not what the scheduler takes it for"


@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize(
    ("class_name", "prediction_type"),
    sorted(set(product(MULTISTEP, ("epsilon", "v_prediction", "flow_prediction"))) - EDM_HAS_NO_FLOW),
)
def test_a_multistep_solvers_preview_is_what_it_makes_of_the_output_itself(
    class_name: str, prediction_type: str, thresholding: bool
) -> None:
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0} if prediction_type == "flow_prediction" else {}
    config = {"_class_name": class_name, "prediction_type": prediction_type, "thresholding": thresholding}
    scheduler = own_scheduler_of(CONFIG | config | flow, STEPS)
    image = stepping_image(scheduler)
    converted: list[Any] = []
    convert = scheduler.convert_model_output

    def convert_and_keep(model_output: torch.Tensor, *args: Any, sample: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = convert(model_output, *args, sample=sample, **kwargs)
        index = scheduler.step_index
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        converted.append((sample - sigma * made) / alpha if class_name.startswith("DEIS") else made)
        return made

    scheduler.convert_model_output = convert_and_keep
    for _ in range(STEPS - 1):
        image.advance({"model_output": RANDOM.normal(size=(1, 4, 6, 5)).astype(np.float32)})
        assert image.preview is not None
        np.testing.assert_allclose(image.preview, converted[-1][0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("class_name", "more"),
    [
        ("CMStochasticIterativeScheduler", {}),
        ("CMStochasticIterativeScheduler", {"clip_denoised": False}),
        ("DDIMScheduler", {"clip_sample": True, "set_alpha_to_one": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("EDMEulerScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("LCMScheduler", {}),
    ],
)
def test_the_estimate_of_the_last_step_is_the_final_latents_where_no_noise_is_left(
    class_name: str, more: dict[str, Any]
) -> None:
    config = CONFIG | {"prediction_type": "epsilon", "_class_name": class_name, **more}
    scheduler = own_scheduler_of(config, STEPS)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((1, 4, 6, 5), generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        answer = torch.randn(latents.shape, generator=generator)
        step = scheduler.step(answer, timestep, latents)
        estimate = predicted_x0(scheduler, step, timestep, answer, latents)
        latents = step.prev_sample
    torch.testing.assert_close(estimate, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "previews", "after"),
    [
        (20, 0, set()),
        (20, 1, {10}),
        (20, 3, {5, 10, 15}),
        (21, 2, {7, 14}),
        (4, 3, {1, 2, 3}),
        (3, 3, {1, 2}),
        (2, 3, {1}),
        (1, 3, set()),
    ],
)
def test_previews_are_evenly_spaced_and_never_the_last_step(steps: int, previews: int, after: set[int]) -> None:
    assert preview_steps(steps, previews) == after
