"""The schedulers that a checkpoint is served with: its own, and those that a request may ask for by name.

Each is a class of diffusers and its complete configuration, and nothing but data for the sampler. All follow from the
checkpoint's own scheduler after diffusers' pipeline has loaded it, as `X.from_config(pipeline.scheduler.config)` does,
and have been through all their steps once: what is in the table can be served.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import diffusers
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Amendments
from hypergen_export.errors import UnsupportedModelError, first_line

Config = Mapping[str, Any]

OWN = ""
"""The name of the checkpoint's own scheduler in a table."""

# What a model was trained with. Where a checkpoint leaves an entry to its scheduler's class, another class would have
# another default.
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
# Beside it what is kept for a class that refuses the rest of the checkpoint's configuration.
_TIMESTEPS = ("timestep_spacing", "steps_offset")
# What diffusers' pipelines take of a scheduler, whatever its class.
_NEEDED = ("order", "init_noise_sigma", "set_timesteps", "scale_model_input", "step")
_REHEARSAL_SIDE = 8


@dataclass(frozen=True)
class Recipe:
    """A class of diffusers, and what is changed in the checkpoint's configuration for it."""

    class_name: str
    overrides: Config = field(default_factory=dict)


OFFERED: Mapping[str, Recipe] = {
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


@dataclass(frozen=True)
class SchedulerTable:
    """Name -> configuration with its `_class_name`. `inpainting` holds those that differ under a mask."""

    schedulers: Mapping[str, Config]
    inpainting: Mapping[str, Config]

    @property
    def names(self) -> tuple[str, ...]:
        """Those that a request may ask for."""
        return tuple(name for name in self.schedulers if name != OWN)

    @property
    def own_name(self) -> str:
        """The one of `names` that is the checkpoint's own scheduler."""
        return _own_name(self.schedulers)


def checkpoint_schedulers(checkpoint: Checkpoint, steps: int) -> SchedulerTable:
    """What a checkpoint is served with where a request takes `steps` steps unasked.

    Raises:
        UnsupportedModelError: its own scheduler cannot be served.
    """
    channels = checkpoint.sizes["latent_channels"]
    try:
        return scheduler_table(checkpoint.scheduler, checkpoint.amendments, steps=steps, channels=channels)
    except ValueError as error:
        raise UnsupportedModelError(f"{checkpoint.folder}: {error}") from error


def scheduler_table(config: Config, amendments: Amendments, *, steps: int, channels: int) -> SchedulerTable:
    """The schedulers that can take `steps` steps on latents of so many channels.

    Args:
        config: the checkpoint's, with the class that its index names.
        amendments: what its pipeline changes in that.
        steps: what a request takes that states no number.
        channels: of the latents.

    Raises:
        ValueError: the checkpoint's own is not among them.
    """
    amended = {**amendments.scheduler, **amendments.inpainting}
    with _silenced():
        schedulers = _schedulers(config, amendments.scheduler, steps, channels)
        under_a_mask = _schedulers(config, amended, steps, channels)
    differing = {name: found for name, found in under_a_mask.items() if schedulers.get(name, found) != found}
    return SchedulerTable(schedulers, differing)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without a warning of diffusers for every entry that one class knows and another does not."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def _schedulers(config: Config, amended: Config, steps: int, channels: int) -> dict[str, Config]:
    class_name = str(config["_class_name"])
    try:
        own = _own(_class(class_name), config, amended)
        _rehearse(own, steps, channels)
    except Exception as error:  # diffusers' schedulers raise what they like
        raise ValueError(f"its scheduler {class_name} cannot be served: {first_line(error)}") from error
    table: dict[str, Config] = {OWN: _complete(own)}
    for name, recipe in OFFERED.items():
        found = table[OWN] if recipe == Recipe(class_name) else _other(own, recipe, steps, channels)
        if found is not None:
            table[name] = found
    return table | {_own_name(table): table[OWN]}


def _own_name(table: Mapping[str, Config]) -> str:
    """What the checkpoint's own scheduler is called; its class where it is none of those that are offered."""
    own = table[OWN]
    class_name = str(own["_class_name"])
    name = next((name for name, recipe in OFFERED.items() if recipe == Recipe(class_name)), class_name)
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
    # In the place of a class whose packages are missing, diffusers has one that names them.
    missing = " ".join(package for package in getattr(kind, "_backends", []) if find_spec(package) is None)
    if missing:
        raise ValueError(f"it needs {missing}, which is not installed (pip install {missing})")
    raise ValueError(f"diffusers {diffusers.__version__} has no such scheduler")


def _own(kind: Any, config: Config, amended: Config) -> Any:
    """The checkpoint's own scheduler as its pipeline has it."""
    own = kind.from_config(config)
    missing = [name for name in _NEEDED if not hasattr(own, name)]
    if missing:
        raise ValueError(f"it has no {missing[0]}, and the pipelines of UNets need it")
    own.register_to_config(**{name: value for name, value in amended.items() if name in own.config})
    return own


def _other(own: Any, recipe: Recipe, steps: int, channels: int) -> Config | None:
    """Another scheduler for the same model; None where diffusers has no way to that.

    With the rest of the checkpoint's configuration if its class takes that, else with its own defaults.
    """
    training = _known(own.config, _TRAINING)
    if not {"beta_schedule", "prediction_type"} <= training.keys():
        return None  # the noise that the model was trained on is not known
    kind = _class(recipe.class_name)
    for config in (own.config, _known(own.config, (*_TIMESTEPS, "_use_default_values"))):
        try:
            scheduler = kind.from_config(config, **training, **recipe.overrides)
            _rehearse(scheduler, steps, channels)
        except Exception:  # as above
            continue
        return _complete(scheduler)
    return None


def _known(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: config[name] for name in names if name in config}


def _complete(scheduler: Any) -> dict[str, Any]:
    """The configuration: all that the class knows, with no entry left to its defaults, and nothing of other classes."""
    kind: Any = type(scheduler)
    known = inspect.signature(kind.__init__).parameters
    stated = {name: value for name, value in scheduler.config.items() if name in known}
    return {"_class_name": kind.__name__, **stated}


def _rehearse(scheduler: Any, steps: int, channels: int) -> None:
    """Take noise through all the steps. Raises whatever the scheduler does, or ValueError."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, channels, _REHEARSAL_SIDE, _REHEARSAL_SIDE)
    scheduler.set_timesteps(steps, device="cpu")
    latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    extra = {name: value for name, value in {"eta": 0.0, "generator": generator}.items() if name in accepted}
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        answer = torch.randn(shape, generator=generator)
        latents = scheduler.step(answer, timestep, latents, **extra).prev_sample
    if not torch.isfinite(latents).all():
        raise ValueError(f"{steps} steps lead to numbers that are not finite")
