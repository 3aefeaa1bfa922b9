"""The schedulers that a request may select.

All are diffusers' own classes with configurations that the exporter derives from the checkpoint's, so images equal
those of diffusers' pipelines by construction.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hypergen_sampler import flow
from hypergen_sampler.diffusers_module import diffusers
from hypergen_sampler.flow import FlowMatchEuler
from hypergen_sampler.request import Architecture, InvalidInputError

FrozenDict = diffusers.configuration_utils.FrozenDict

_TRIAL_SHAPE = (1, 4, 8, 8)


class Schedulers:
    """The checkpoint's own scheduler and the selectable ones, from the table beside the model's version folders.

    The table maps names to complete configurations with the name of the diffusers class. The checkpoint's own scheduler
    has the empty name. Configurations that differ when inpainting are in a second mapping.

    `flow_sigmas` and `flow_shift` are those of `FlowMatchEuler`.

    Raises:
        Exception: whatever diffusers raises if a scheduler cannot be created.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Any]], *, flow_sigmas: str = "", flow_shift: str = "") -> None:
        self._always = {name: _made(config) for name, config in table["schedulers"].items()}
        self._under_a_mask = self._always | {name: _made(config) for name, config in table["inpainting"].items()}
        self._flow_sigmas, self._flow_shift = flow_sigmas, flow_shift
        self._trial_errors: dict[tuple[str, bool, int], str] = {}

    @classmethod
    def read(cls, folder: Path, architecture: Architecture) -> Schedulers:
        """Read the table in `folder`."""
        table = json.loads((folder / "schedulers.json").read_text())
        return cls(table, flow_sigmas=architecture.flow_sigmas, flow_shift=architecture.flow_shift)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `make` accepts."""
        return tuple(self._always)

    def make(self, name: str, *, steps: int, image_tokens: int = 0, masked: bool = False) -> Any:
        """Create a scheduler for one image, as it holds the state of sampling; the empty name is the checkpoint's own.

        `image_tokens` are the tokens that the image has in a transformer.

        Raises:
            InvalidInputError: the scheduler does not support this number of steps.
        """
        scheduler = _copy((self._under_a_mask if masked else self._always)[name])
        if isinstance(scheduler, FlowMatchEuler):
            scheduler.flow_sigmas, scheduler.flow_shift = self._flow_sigmas, self._flow_shift
            scheduler.image_tokens = image_tokens
        key = (name, masked, steps)
        if key not in self._trial_errors:
            self._trial_errors[key] = _trial_run(_copy(scheduler), steps)
        if self._trial_errors[key]:
            raise InvalidInputError("num_inference_steps", f"the scheduler refuses {steps}: {self._trial_errors[key]}")
        return scheduler


def step_arguments(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """The optional arguments that `step` accepts, as in diffusers' `prepare_extra_step_kwargs` with eta 0."""
    offered = {"eta": 0.0, "generator": generator}
    kind: Any = type(scheduler)
    return {name: value for name, value in offered.items() if name in _accepted(kind)}


@functools.cache
def _accepted(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.step).parameters)


def _made(config: Mapping[str, Any]) -> Any:
    name = config["_class_name"]
    return (FlowMatchEuler if name == flow.CLASS_NAME else getattr(diffusers, name)).from_config(config)


def _copy(pristine: Any) -> Any:
    """Copy a scheduler, which takes a fifth of the time that diffusers needs to create one.

    Copies share tensors and configuration, as diffusers replaces a scheduler's tensors and never modifies them.
    """
    shared = [value for value in vars(pristine).values() if isinstance(value, (torch.Tensor, FrozenDict))]
    return copy.deepcopy(pristine, {id(value): value for value in shared})


def _trial_run(scheduler: Any, steps: int) -> str:
    """The error of a trial run, or an empty string. It takes all `steps` steps, as the last one may fail."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.ones(_TRIAL_SHAPE)
    try:
        scheduler.set_timesteps(steps, device="cpu")
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(latents, timestep)
            answer = torch.randn(_TRIAL_SHAPE, generator=generator)
            latents = scheduler.step(answer, timestep, latents, **step_arguments(scheduler, generator)).prev_sample
    except Exception as error:  # diffusers' schedulers raise many kinds of errors
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return "" if latents.isfinite().all() else "the results are not finite"
