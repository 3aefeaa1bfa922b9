"""The schedulers of a checkpoint: its own, and those that a request may select by name.

Each is a diffusers class with its complete configuration, passed to the sampler as data. All are derived from the
checkpoint's own scheduler as diffusers' pipeline loads it, like `X.from_config(pipeline.scheduler.config)`. Each has
taken all its steps once on random latents, so every scheduler in the table can be served.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import diffusers
import numpy as np
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.family import ConfigOverrides
from hypergen_export.errors import UnsupportedModelError, first_line

Config = Mapping[str, Any]

OWN = ""
"""The name of the checkpoint's own scheduler in a table."""

# Entries that describe the model's training. If a checkpoint leaves one to its scheduler class's default, the default
# of another class may differ.
_TRAINING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
    "flow_shift",
)
# Entries also kept for a class that rejects the rest of the checkpoint's configuration.
_TIMESTEPS = ("timestep_spacing", "steps_offset")
# The scheduler of families whose latents flow, and the name under which a request may select it.
FLOW_SCHEDULER, _FLOW_NAME = "FlowMatchEulerDiscreteScheduler", "euler"
# The only one of Sana-Sprint.
_ARC_SCHEDULER = "SCMScheduler"
# Those whose sigmas may be the flow's. DEIS, too, but it leaves noise: its last step ends where it starts.
_FLOW_SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc")
# Attributes of a scheduler that diffusers' pipelines use.
_NEEDED = ("order", "init_noise_sigma", "set_timesteps", "scale_model_input", "step")
_TRIAL_SIDE = 8


@dataclass(frozen=True)
class SchedulerSpec:
    """A diffusers class and its changes to the checkpoint's configuration."""

    class_name: str
    overrides: Config = field(default_factory=dict)


SELECTABLE: Mapping[str, SchedulerSpec] = {
    "ddim": SchedulerSpec("DDIMScheduler"),
    "ddpm": SchedulerSpec("DDPMScheduler"),
    "deis": SchedulerSpec("DEISMultistepScheduler"),
    "dpmpp_2m": SchedulerSpec("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": SchedulerSpec("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": SchedulerSpec("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": SchedulerSpec("DPMSolverSinglestepScheduler"),
    "euler": SchedulerSpec("EulerDiscreteScheduler"),
    "euler_a": SchedulerSpec("EulerAncestralDiscreteScheduler"),
    "heun": SchedulerSpec("HeunDiscreteScheduler"),
    "lcm": SchedulerSpec("LCMScheduler"),
    "pndm": SchedulerSpec("PNDMScheduler"),
    "tcd": SchedulerSpec("TCDScheduler"),
    "unipc": SchedulerSpec("UniPCMultistepScheduler"),
}


@dataclass(frozen=True)
class SchedulerTable:
    """Name -> configuration with its `_class_name`. `inpainting` holds configurations that differ for inpainting."""

    schedulers: Mapping[str, Config]
    inpainting: Mapping[str, Config]

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request may select."""
        return tuple(name for name in self.schedulers if name != OWN)

    @property
    def own_name(self) -> str:
        """The name of the checkpoint's own scheduler."""
        return _own_name(self.schedulers)


def checkpoint_schedulers(checkpoint: Checkpoint, steps: int) -> SchedulerTable:
    """The schedulers of a checkpoint whose default number of steps is `steps`.

    Raises:
        UnsupportedModelError: the checkpoint's own scheduler cannot be served.
    """
    channels = checkpoint.sizes["latent_channels"]
    try:
        if checkpoint.family.sampling.is_flow:
            return _flow_table(checkpoint, steps)
        return scheduler_table(checkpoint.scheduler, checkpoint.overrides, steps=steps, channels=channels)
    except ValueError as error:
        raise UnsupportedModelError(f"{checkpoint.folder}: {error}") from error


def scheduler_table(config: Config, overrides: ConfigOverrides, *, steps: int, channels: int) -> SchedulerTable:
    """The schedulers that can take `steps` steps on latents with `channels` channels.

    Args:
        config: the checkpoint's scheduler config, with its class name.
        overrides: what the pipeline changes in the config.
        steps: the default number of steps.
        channels: the number of latent channels.

    Raises:
        ValueError: the checkpoint's own scheduler cannot.
    """
    overridden = {**overrides.scheduler, **overrides.inpainting}
    with _silenced():
        schedulers = _schedulers(_own(config, overrides.scheduler), steps, channels)
        if overridden == overrides.scheduler:
            return SchedulerTable(schedulers, {})
        inpainting = _schedulers(_own(config, overridden), steps, channels)
    differing = {name: found for name, found in inpainting.items() if schedulers.get(name, found) != found}
    return SchedulerTable(schedulers, differing)


def _flow_table(checkpoint: Checkpoint, steps: int) -> SchedulerTable:
    """The schedulers of a checkpoint for flow matching. Raises ValueError."""
    config, sampling = checkpoint.scheduler, checkpoint.family.sampling
    class_name = str(config["_class_name"])
    if config.get("use_flow_sigmas") and not (sampling.flow_sigmas or sampling.flow_shift):
        return _flow_solvers(config, steps, checkpoint.sizes["latent_channels"])
    if class_name == _ARC_SCHEDULER and checkpoint.family.name == "sana-sprint":
        complete = _complete(diffusers.SCMScheduler.from_config(config))
        return SchedulerTable({OWN: complete, _ARC_SCHEDULER: complete}, {})
    if class_name != FLOW_SCHEDULER:
        raise ValueError(f"its scheduler {class_name} is not supported for this family; {FLOW_SCHEDULER} is")
    with _silenced(), _naming(class_name):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        sigmas = np.linspace(1.0, 1 / steps, steps) if sampling.flow_sigmas else None
        has_shift = scheduler.config.use_dynamic_shifting and sampling.flow_shift
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=1.0 if has_shift else None)
    complete = _complete(scheduler)
    return SchedulerTable({OWN: complete, _FLOW_NAME: complete}, {})


def _flow_solvers(config: Config, steps: int, channels: int) -> SchedulerTable:
    """The checkpoint's own scheduler, one for differential equations of any kind, and others with its flow.

    Raises ValueError.
    """
    with _silenced():
        found = _schedulers(_own(config, {}), steps, channels)
        names = (OWN, _own_name(found), *_FLOW_SOLVERS)
        euler = diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=found[OWN]["num_train_timesteps"], shift=found[OWN]["flow_shift"]
        )
    table = {name: scheduler for name, scheduler in found.items() if name in names}
    return SchedulerTable({**table, _FLOW_NAME: _complete(euler)}, {})


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress diffusers' warnings about entries that one class has and another does not."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


@contextlib.contextmanager
def _naming(class_name: str) -> Iterator[None]:
    """Raise a ValueError that says which scheduler cannot be served in place of any error."""
    try:
        yield
    except Exception as error:  # diffusers' schedulers raise errors of many kinds
        raise ValueError(f"its scheduler {class_name} cannot be served: {first_line(error)}") from error


def _schedulers(own: Any, steps: int, channels: int) -> dict[str, Config]:
    class_name = type(own).__name__
    with _naming(class_name):
        _trial_run(own, steps, channels)
    table: dict[str, Config] = {OWN: _complete(own)}
    for name, spec in SELECTABLE.items():
        found = table[OWN] if spec == SchedulerSpec(class_name) else _other(own, spec, steps, channels)
        if found is not None:
            table[name] = found
    return table | {_own_name(table): table[OWN]}


def _own_name(table: Mapping[str, Config]) -> str:
    """The name of the checkpoint's own scheduler: its class name if it is not one of SELECTABLE."""
    own = table[OWN]
    class_name = str(own["_class_name"])
    if class_name == FLOW_SCHEDULER:
        return _FLOW_NAME
    name = next((name for name, spec in SELECTABLE.items() if spec == SchedulerSpec(class_name)), class_name)
    if name == "dpmpp_2m":
        if own["algorithm_type"] != "dpmsolver++":
            name = class_name
        elif own["use_karras_sigmas"]:
            name = "dpmpp_2m_karras"
    return name


def _class(name: str) -> Any:
    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
        return kind
    # If a class's packages are missing, diffusers exports a placeholder that names them.
    missing = " ".join(package for package in getattr(kind, "_backends", []) if find_spec(package) is None)
    if missing:
        raise ValueError(f"it needs a package that is not installed: pip install {missing}")
    raise ValueError(f"diffusers {diffusers.__version__} has no such scheduler")


def _own(config: Config, overridden: Config) -> Any:
    """The checkpoint's own scheduler as its pipeline loads it. Raises ValueError."""
    class_name = str(config["_class_name"])
    with _naming(class_name):
        own = _class(class_name).from_config(config)
        missing = [name for name in _NEEDED if not hasattr(own, name)]
        if missing:
            raise ValueError(f"it has no {missing[0]}, which the sampler needs")
        own.register_to_config(**{name: value for name, value in overridden.items() if name in own.config})
    return own


def _other(own: Any, spec: SchedulerSpec, steps: int, channels: int) -> Config | None:
    """Another scheduler for the same model; None if diffusers cannot derive it.

    It keeps the rest of the checkpoint's configuration if its class accepts that, else its own defaults.
    """
    training = _known(own.config, _TRAINING)
    if not {"beta_schedule", "prediction_type"} <= training.keys():
        return None  # the model's noise schedule is not known
    kind = _class(spec.class_name)
    for config in (own.config, _known(own.config, (*_TIMESTEPS, "_use_default_values"))):
        try:
            scheduler = kind.from_config(config, **training, **spec.overrides)
            _trial_run(scheduler, steps, channels)
        except Exception:  # as above
            continue
        return _complete(scheduler)
    return None


def _known(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: config[name] for name in names if name in config}


def _complete(scheduler: Any) -> dict[str, Any]:
    """The scheduler's configuration: every parameter of its class with its value, and no other entries."""
    kind: Any = type(scheduler)
    known = inspect.signature(kind.__init__).parameters
    stated = {name: value for name, value in scheduler.config.items() if name in known}
    return {"_class_name": kind.__name__, **stated}


def _trial_run(scheduler: Any, steps: int, channels: int) -> None:
    """Take all steps on random latents. Raises ValueError, or whatever the scheduler raises."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, channels, _TRIAL_SIDE, _TRIAL_SIDE)
    scheduler.set_timesteps(steps, device="cpu")
    latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    extra = {name: value for name, value in {"eta": 0.0, "generator": generator}.items() if name in accepted}
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        model_output = torch.randn(shape, generator=generator)
        latents = scheduler.step(model_output, timestep, latents, **extra).prev_sample
    if not torch.isfinite(latents).all():
        raise ValueError(f"{steps} steps give non-finite latents")
