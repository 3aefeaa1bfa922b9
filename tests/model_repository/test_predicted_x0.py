"""What the previews show, against the closed form: a UNet that knows the original must have it in every estimate."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hypergen_sampler.latent_init import LatentInit
from hypergen_sampler.predicted_x0 import preview_steps
from hypergen_sampler.request import Request
from hypergen_sampler.sampling import Image
from support.scheduler_tables import CLASSES, schedulers_of

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
ORIGINAL = np.random.default_rng(3).normal(size=(1, 4, 6, 5)).astype(np.float32)
# Of the largest value. The sigmas of Karras lie between the timesteps, and the UNet is told the nearest of these.
TOLERANCE = {"dpmpp_2m_karras": 2e-3}
NOT_IN_DIFFUSERS = {("pndm", "sample"), ("euler_a", "sample")}
STEPS = 9


def image_of(scheduler: str, prediction_type: str, guidance_scale: float) -> Image:
    request = Request(
        prompt="x",
        negative_prompt=None,
        num_images=1,
        width=40,
        height=48,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seed=4,
        partial_images=3,
    )
    states = np.zeros((2 if guidance_scale > 1 else 1, 1, 1), dtype=np.float32)
    schedulers = schedulers_of(CONFIG | {"prediction_type": prediction_type})
    made = schedulers.make(scheduler, steps=STEPS)
    return Image(request, {"encoder_hidden_states": states}, LatentInit((4, 6, 5)), made, "unet")


def answer_of_one_who_knows(image: Image, alphas_cumprod: Any, prediction_type: str, guidance_scale: float) -> Any:
    """The model output [R, C, h, w] that is right for ORIGINAL: of two rows, neither is, but their guided sum."""
    rows = image.unet_rows()
    timesteps = np.arange(len(alphas_cumprod))
    noise_ratio = np.interp(rows.timestep[0], timesteps, ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)
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
    betas = torch.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000) ** 2  # type: ignore[operator]
    alphas_cumprod = torch.cumprod(1 - betas, 0).double().numpy()
    previews = []
    while not image.finished:
        answer = answer_of_one_who_knows(image, alphas_cumprod, prediction_type, guidance_scale)
        image.advance({"model_output": answer})
        if image.preview is not None:
            previews.append((image.steps_done, image.preview))
    largest = np.abs(ORIGINAL).max()
    errors = [float(np.abs(preview - ORIGINAL[0]).max() / largest) for _, preview in previews]
    print(scheduler, prediction_type, [f"{error:.1e}" for error in errors])
    assert len(previews) == 3
    assert max(errors) <= TOLERANCE.get(scheduler, 1e-5)


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
