"""The schedulers that a request may select.

All are diffusers' own classes with configurations that the exporter derives from the checkpoint's, so images equal
those of diffusers' pipelines by construction.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypergen_sampler import flow, trigflow
from hypergen_sampler.diffusers_module import diffusers
from hypergen_sampler.flow import FlowMatchEuler
from hypergen_sampler.request import Architecture, InvalidInputError

FrozenDict = diffusers.configuration_utils.FrozenDict

# Names of diffusers' classes that have another interface than most, and ours in their place.
_OURS: Mapping[str, Any] = {flow.CLASS_NAME: FlowMatchEuler, trigflow.CLASS_NAME: trigflow.TrigFlow}
_TRIAL_SHAPE = (1, 4, 8, 8)
# How sigmas are spaced -> the entry of a configuration that says so.
_SIGMAS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}


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
        self._trial_errors: dict[tuple[Hashable, int], str] = {}

    @classmethod
    def read(cls, folder: Path, architecture: Architecture) -> Schedulers:
        """Read the table in `folder`."""
        table = json.loads((folder / "schedulers.json").read_text())
        return cls(table, flow_sigmas=architecture.flow_sigmas, flow_shift=architecture.flow_shift)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `make` accepts."""
        return tuple(self._always)

    def make(  # noqa: PLR0913 - what a request says of its scheduler
        self,
        name: str,
        *,
        steps: int,
        timestep_spacing: str = "",
        sigmas: str = "",
        eta: float = 0.0,
        image_tokens: int = 0,
        masked: bool = False,
    ) -> Any:
        """Create a scheduler for one image, as it holds the state of sampling; the empty name is the checkpoint's own.

        `timestep_spacing` and `sigmas` are empty for those of its configuration. `eta` is what `step` will be given;
        `image_tokens` are the tokens that the image has in a transformer.

        Raises:
            InvalidInputError: the scheduler does not support this number of steps, or what was chosen for it.
        """
        choice = _Choice(name, timestep_spacing, sigmas)
        scheduler = _copy(self._pristine(choice, masked))
        kind: Any = type(scheduler)
        if eta and "eta" not in _accepted(kind):
            raise InvalidInputError("eta", "must be absent or 0, as the scheduler takes none; ddim does")
        if isinstance(scheduler, FlowMatchEuler):
            scheduler.flow_sigmas, scheduler.flow_shift = self._flow_sigmas, self._flow_shift
            scheduler.image_tokens = image_tokens
        key = ((choice, masked), steps)
        if key not in self._trial_errors:
            self._trial_errors[key] = _trial_run(_copy(scheduler), steps)
        if self._trial_errors[key]:
            raise InvalidInputError("num_inference_steps", f"the scheduler refuses {steps}: {self._trial_errors[key]}")
        return scheduler

    def _pristine(self, choice: _Choice, masked: bool) -> Any:
        named = (self._under_a_mask if masked else self._always)[choice.name]
        overrides = choice.overrides
        if not overrides:
            return named
        for key, name in (("timestep_spacing", "timestep_spacing"), (_SIGMAS["karras"], "sigmas")):
            # Distilled models have timesteps of their own: their schedulers have the entry but do not read it. With the
            # sigmas of flow matching, others read it not at all, or instead of those.
            has_flow = named.config.get("use_flow_sigmas")
            is_unread = key not in named.config or "original_inference_steps" in named.config or has_flow
            if key in overrides and is_unread:
                others = "" if has_flow else "; euler and dpmpp_2m do"
                raise InvalidInputError(name, f"must be absent, as the scheduler has no choice of it{others}")
        try:
            return type(named).from_config({**named.config, **overrides})
        except ImportError:
            raise InvalidInputError(
                "sigmas", f"must not be {choice.sigmas}, as the server lacks the package scipy"
            ) from None
        except ValueError as error:
            raise InvalidInputError("sigmas", f"{choice.sigmas}: the scheduler refuses it: {error}") from None


@dataclass(frozen=True)
class _Choice:
    """A scheduler by its name, and what a request changes of its configuration."""

    name: str
    timestep_spacing: str
    sigmas: str

    @property
    def overrides(self) -> dict[str, Any]:
        """Entries of the scheduler's configuration."""
        spacing = {"timestep_spacing": self.timestep_spacing} if self.timestep_spacing else {}
        sigmas = {entry: name == self.sigmas for name, entry in _SIGMAS.items()} if self.sigmas in _SIGMAS else {}
        return {**spacing, **sigmas}


def step_arguments(scheduler: Any, generator: torch.Generator, eta: float = 0.0) -> dict[str, Any]:
    """The optional arguments that `step` accepts, as in diffusers' `prepare_extra_step_kwargs`."""
    offered = {"eta": eta, "generator": generator}
    kind: Any = type(scheduler)
    return {name: value for name, value in offered.items() if name in _accepted(kind)}


@functools.cache
def _accepted(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.step).parameters)


def _made(config: Mapping[str, Any]) -> Any:
    name = config["_class_name"]
    return (_OURS[name] if name in _OURS else getattr(diffusers, name)).from_config(config)


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
