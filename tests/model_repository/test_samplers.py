"""The table of schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from samplers import SCHEDULERS, make_scheduler

TEMPLATE = Path(__file__).parents[2] / "model_repository" / "diffusion" / "config.pbtxt"
CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "num_train_timesteps": 1000,
}


def test_the_names_are_those_that_config_pbtxt_promises() -> None:
    config = text_format.Parse(TEMPLATE.read_text(), model_config_pb2.ModelConfig())
    assert config.parameters["schedulers"].string_value.split(",") == sorted(SCHEDULERS)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_keeps_the_checkpoints_noise_schedule(name: str) -> None:
    scheduler: Any = make_scheduler(name, CONFIG)
    assert type(scheduler).__name__ == SCHEDULERS[name].class_name
    assert scheduler.config.beta_end == 0.012
    assert scheduler.config.prediction_type == "v_prediction"


def test_no_name_means_the_checkpoints_own() -> None:
    assert type(make_scheduler("", CONFIG)).__name__ == "PNDMScheduler"


def test_overrides_reach_the_scheduler() -> None:
    assert make_scheduler("dpmpp_2m_karras", CONFIG).config.use_karras_sigmas is True
    assert not make_scheduler("dpmpp_2m", CONFIG).config.use_karras_sigmas
