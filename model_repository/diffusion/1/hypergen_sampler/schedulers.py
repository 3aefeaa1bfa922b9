"""The schedulers that a request may select.

All are diffusers' own classes with configurations that the exporter derives from the checkpoint's, so images equal
those of diffusers' pipelines by construction.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hypergen_sampler.request import InvalidInputError


def _import_diffusers() -> Any:
    """Import diffusers without torch's compiler, which it imports only to exclude functions from compilation.

    Nothing is compiled here. This makes each start a second faster on one core.
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

_TRIAL_SHAPE = (1, 4, 8, 8)


class Schedulers:
    """The checkpoint's own scheduler and the selectable ones, from the table beside the model's version folders.

    The table maps names to complete configurations with the name of the diffusers class. The checkpoint's own scheduler
    has the empty name. Configurations that differ when inpainting are in a second mapping.

    Raises:
        Exception: whatever diffusers raises if a scheduler cannot be created.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        self._always = {name: _made(config) for name, config in table["schedulers"].items()}
        self._under_a_mask = self._always | {name: _made(config) for name, config in table["inpainting"].items()}
        self._trial_errors: dict[tuple[str, bool, int], str] = {}

    @classmethod
    def read(cls, folder: Path) -> Schedulers:
        """Read the table in `folder`."""
        return cls(json.loads((folder / "schedulers.json").read_text()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `make` accepts."""
        return tuple(self._always)

    def make(self, name: str, *, steps: int, masked: bool = False) -> Any:
        """Create a scheduler for one image, as it holds the state of sampling; the empty name is the checkpoint's own.

        Raises:
            InvalidInputError: the scheduler does not support this number of steps.
        """
        pristine = (self._under_a_mask if masked else self._always)[name]
        key = (name, masked, steps)
        if key not in self._trial_errors:
            self._trial_errors[key] = _trial_run(_copy(pristine), steps)
        if self._trial_errors[key]:
            raise InvalidInputError("num_inference_steps", f"the scheduler refuses {steps}: {self._trial_errors[key]}")
        return _copy(pristine)


def step_arguments(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """The optional arguments that `step` accepts, as in diffusers' `prepare_extra_step_kwargs` with eta 0."""
    offered = {"eta": 0.0, "generator": generator}
    kind: Any = type(scheduler)
    return {name: value for name, value in offered.items() if name in _accepted(kind)}


@functools.cache
def _accepted(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.step).parameters)


def _made(config: Mapping[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config)


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
