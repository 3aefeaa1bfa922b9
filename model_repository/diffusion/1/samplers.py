"""The schedulers a request may name. All of them are diffusers' own classes on the checkpoint's own configuration,
so that a picture equals the one of diffusers' pipeline by construction.

Knows diffusers; knows nothing of requests, batches or Triton.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


def _import_diffusers() -> Any:
    """diffusers without torch's compiler, which it loads to mark what is not to be compiled, and does without.

    That is a second less of each start, on one core. Nothing here is compiled.
    """
    compiler = "torch._dynamo"
    if compiler in sys.modules:
        return importlib.import_module("diffusers")
    sys.modules[compiler] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        return importlib.import_module("diffusers")
    finally:
        del sys.modules[compiler]


diffusers = _import_diffusers()
FrozenDict = diffusers.configuration_utils.FrozenDict


@dataclass(frozen=True)
class Recipe:
    """A diffusers class and what is changed in the checkpoint's configuration for it."""

    class_name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


SCHEDULERS: Mapping[str, Recipe] = {
    "ddim": Recipe("DDIMScheduler"),
    "ddpm": Recipe("DDPMScheduler"),
    "deis": Recipe("DEISMultistepScheduler"),
    "dpmpp_2m": Recipe("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": Recipe("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": Recipe("EulerDiscreteScheduler"),
    "euler_a": Recipe("EulerAncestralDiscreteScheduler"),
    "heun": Recipe("HeunDiscreteScheduler"),
    "lcm": Recipe("LCMScheduler"),
    "pndm": Recipe("PNDMScheduler"),
    "tcd": Recipe("TCDScheduler"),
    "unipc": Recipe("UniPCMultistepScheduler"),
}


def make_scheduler(name: str, checkpoint_config: Mapping[str, Any]) -> Any:
    """A fresh scheduler: the one named, or the checkpoint's own where `name` is empty.

    A scheduler holds the state of one image's sampling, so every image has its own.
    """
    pristine = _pristine(name, json.dumps(checkpoint_config))
    # diffusers replaces a scheduler's tensors and never writes into one: copies share them, and the configuration.
    shared = [value for value in vars(pristine).values() if isinstance(value, (torch.Tensor, FrozenDict))]
    return copy.deepcopy(pristine, {id(value): value for value in shared})


@functools.lru_cache(maxsize=2 * len(SCHEDULERS))
def _pristine(name: str, checkpoint_config: str) -> Any:
    """A scheduler to copy, which takes a fifth of the time that diffusers needs to make one."""
    config = json.loads(checkpoint_config)
    recipe = SCHEDULERS[name] if name else Recipe(config["_class_name"])
    return getattr(diffusers, recipe.class_name).from_config(config, **recipe.overrides)
