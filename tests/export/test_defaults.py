from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hypergen_export.checkpoint import open_checkpoint
from hypergen_export.defaults import checkpoint_parameters, scheduler_name
from hypergen_export.errors import BrokenCheckpointError

from .conftest import edit_json

KNOWN = ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "euler", "pndm")


def parameters(folder: Path, **defaults: Any) -> dict[str, str]:
    if defaults:
        (folder / "hypergen_defaults.json").write_text(json.dumps(defaults))
    return checkpoint_parameters(open_checkpoint(str(folder)), KNOWN)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "DPMSolverMultistepScheduler",
        ),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),  # no name of KNOWN
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ],
)
def test_a_scheduler_is_called_as_requests_call_it_or_by_its_class(config: dict[str, Any], name: str) -> None:
    assert scheduler_name(config, KNOWN) == name


def test_what_a_checkpoint_recommends_is_the_default(checkpoint_copy: Path) -> None:
    found = parameters(checkpoint_copy, num_inference_steps=20, guidance_scale=3, width=96, height=72, max_size=256)
    assert found["default_num_inference_steps"] == "20"
    assert found["default_guidance_scale"] == "3"
    assert (found["default_width"], found["default_height"]) == ("96", "72")
    assert (found["min_size"], found["max_size"]) == ("64", "256")


@pytest.mark.parametrize(
    ("sample_size", "sides", "limits"),
    [
        (64, ("512", "512"), ("64", "1024")),
        (96, ("768", "768"), ("64", "1536")),
        (4, ("32", "32"), ("32", "1024")),
        ([8, 12], ("96", "64"), ("64", "1024")),
    ],
)
def test_sizes_follow_from_what_the_unet_was_trained_on(
    checkpoint_copy: Path, sample_size: Any, sides: tuple[str, str], limits: tuple[str, str]
) -> None:
    edit_json(checkpoint_copy / "unet" / "config.json", sample_size=sample_size)
    found = parameters(checkpoint_copy)
    assert (found["default_width"], found["default_height"]) == sides
    assert (found["min_size"], found["max_size"]) == limits


def test_limits_are_multiples_of_the_vaes_factor(checkpoint_copy: Path) -> None:
    found = parameters(checkpoint_copy, min_size=33, max_size=999)
    assert (found["min_size"], found["max_size"]) == ("40", "992")


def test_suggestions_travel_one_a_line(checkpoint_copy: Path) -> None:
    assert parameters(checkpoint_copy)["suggestions"] == ""
    prompts = ["a rocket, on yellow", "Crème brûlée"]
    assert parameters(checkpoint_copy, suggestions=prompts)["suggestions"].splitlines() == prompts


@pytest.mark.parametrize(
    "defaults",
    [
        {"width": 100},
        {"max_size": 32},
        {"num_inference_steps": "many"},
        {"suggestions": "a rocket"},
        {"suggestions": ["two\nlines"]},
    ],
)
def test_defaults_that_cannot_be_are_a_broken_checkpoint(checkpoint_copy: Path, defaults: dict[str, Any]) -> None:
    with pytest.raises(BrokenCheckpointError, match="default"):
        parameters(checkpoint_copy, **defaults)
