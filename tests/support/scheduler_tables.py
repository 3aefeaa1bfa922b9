"""Schedulers by their names in requests: from the exporter's table, and created as diffusers' documentation does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import diffusers

from hypergen_export.checkpoints import schedulers
from hypergen_export.checkpoints.family import ConfigOverrides
from hypergen_export.checkpoints.schedulers import SchedulerTable, scheduler_table
from hypergen_sampler.schedulers import Schedulers

# As diffusers' documentation calls them.
CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# Classes that a checkpoint may have as its own.
SERVED = (
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


def called_by_diffusers(name: str, own: Any) -> Any:
    """What a user of diffusers takes in the place of a pipeline's `own` scheduler."""
    class_name, overrides = CLASSES[name]
    return getattr(diffusers, class_name).from_config(own.config, **overrides)


def schedulers_of(config: Mapping[str, Any], overrides: ConfigOverrides | None = None, steps: int = 20) -> Schedulers:
    """The sampler's, of a checkpoint whose scheduler has this configuration."""
    return schedulers_in(scheduler_table(config, overrides or ConfigOverrides(), steps=steps, channels=4))


def own_scheduler_of(config: Mapping[str, Any], steps: int) -> Any:
    """The checkpoint's own scheduler for so many steps, without the time that trying the others takes."""
    with patch.object(schedulers, "SELECTABLE", {}):
        return schedulers_of(config, steps=steps).make("", steps=steps)


def schedulers_in(table: SchedulerTable, **flow: str) -> Schedulers:
    """The sampler's, from the file that the exporter makes of its table."""
    return Schedulers(json.loads(json.dumps(asdict(table))), **flow)
