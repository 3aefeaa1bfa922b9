"""Schedulers from the exporter's table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from hypergen_sampler.request import InvalidInputError
from hypergen_sampler.schedulers import Schedulers
from support.scheduler_tables import CLASSES, called_by_diffusers, schedulers_of

CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "num_train_timesteps": 1000,
}


@pytest.fixture(scope="module")
def schedulers() -> Schedulers:
    return schedulers_of(CONFIG)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_scheduler_has_the_configuration_that_diffusers_gives_it(name: str, schedulers: Schedulers) -> None:
    ours = schedulers.make(name, steps=20)
    theirs = called_by_diffusers(name, PNDMScheduler.from_config(CONFIG))
    assert type(ours) is type(theirs)
    assert ours.config.beta_end == 0.012
    assert ours.config.prediction_type == "v_prediction"
    for given in (ours, theirs):
        given.set_timesteps(20)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=0)


def test_no_name_means_the_checkpoints_own(schedulers: Schedulers) -> None:
    assert type(schedulers.make("", steps=4)).__name__ == "PNDMScheduler"


def test_every_image_has_a_scheduler_of_its_own(schedulers: Schedulers) -> None:
    one, other = (schedulers.make("euler", steps=4) for _ in range(2))
    one.set_timesteps(4)
    other.set_timesteps(7)
    assert (len(one.timesteps), len(other.timesteps)) == (4, 7)


def test_overrides_reach_the_scheduler(schedulers: Schedulers) -> None:
    assert schedulers.make("dpmpp_2m_karras", steps=4).config.use_karras_sigmas is True
    assert not schedulers.make("dpmpp_2m", steps=4).config.use_karras_sigmas


def test_sigmas_that_need_another_package_are_refused_without_it(
    schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_discrete.is_scipy_available", lambda: False)
    with pytest.raises(InvalidInputError, match=r"^sigmas: must not be beta, as the server lacks the package scipy"):
        schedulers.make("euler", steps=4, sigmas="beta")


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "_class_name": "DDIMScheduler"}


@pytest.mark.parametrize(
    ("config", "name", "steps", "taken"),
    [
        # diffusers takes one timestep for two there, and goes on from the second.
        (CONFIG | ZERO_SNR, "dpmpp_2m_karras", 50, 20),
        # Runge-Kutta needs four steps.
        (CONFIG | {"skip_prk_steps": False}, "pndm", 3, 4),
        # More than the model was distilled from.
        (CONFIG | {"original_inference_steps": 50}, "lcm", 51, 50),
    ],
)
def test_a_number_of_steps_that_diffusers_fails_at_is_refused_before_the_first(
    config: dict[str, Any], name: str, steps: int, taken: int
) -> None:
    schedulers = schedulers_of(config)
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=f"num_inference_steps: the scheduler refuses {steps}: "):
            schedulers.make(name, steps=steps)
    schedulers.make(name, steps=taken)
