"""The modules of a single file by diffusers' names, through diffusers' own conversion.

Tensors stay views of the mapped file: conversion only renames, slices and transposes most of them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hypergen_export.errors import BrokenCheckpointError, first_line
from hypergen_export.single_files.configs import Config, bare_name, clip_config, clip_loader, unet_config, vae_config
from hypergen_export.single_files.kinds import UNET, ClipEncoder, Kind, Shapes
from hypergen_export.single_files.reading import Tensors

VAE = "first_stage_model."
# Buffers that a module computes itself.
_COMPUTED = ("position_ids",)


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module to be written: its folder, its class, its config, and its tensors by diffusers' names."""

    name: str
    loader: str
    config: Config
    tensors: Tensors


def modules_of(kind: Kind, tensors: Tensors) -> tuple[list[Module], set[str]]:
    """The modules that the file holds, and the names of the tensors that belong to none of them.

    Raises BrokenCheckpointError for tensors that are missing, without the file's name.
    """
    with NoCopies() as used:
        modules = [_unet(kind, tensors)]
        if any(name.startswith(VAE) for name in tensors):
            modules.append(_vae(kind, tensors))
        modules += [_clip(each, tensors) for each in kind.text_encoders if any(map(_starts(each.prefix), tensors))]
    for module in modules:
        checked(module)
        used.add_all(module.tensors.values())
    return modules, {name for name, tensor in tensors.items() if not used.has(tensor)}


def _unet(kind: Kind, tensors: Tensors) -> Module:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = _config("its UNet", lambda: unet_config(kind, _shapes(tensors)))
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    return Module(
        name="unet",
        loader="diffusers.UNet2DConditionModel",
        config=config,
        tensors=convert_ldm_unet_checkpoint(own, config),
    )


def _vae(kind: Kind, tensors: Tensors) -> Module:
    own = {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}
    said = {"force_upcast": kind.force_upcast, "sample_size": kind.side, "scaling_factor": kind.scaling_factor}
    return converted_vae(own, said)


def converted_vae(tensors: Tensors, own: Mapping[str, Any]) -> Module:
    """An AutoencoderKL of tensors by the names of latent diffusion; `own` are entries of its config."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = _config("its VAE", lambda: vae_config(own, _shapes(tensors)))
    converted = convert_ldm_vae_checkpoint({f"{VAE}{name}": tensor for name, tensor in tensors.items()}, config)
    return Module(name="vae", loader="diffusers.AutoencoderKL", config=config, tensors=converted)


def _clip(encoder: ClipEncoder, tensors: Tensors) -> Module:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    own = {name: tensor for name, tensor in tensors.items() if name.startswith(encoder.prefix)}
    if encoder.is_open_clip:
        width = own[f"{encoder.prefix}token_embedding.weight"].shape[1]
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
        converted = convert_open_clip_checkpoint(model, own, prefix=encoder.prefix)
    else:
        converted = convert_ldm_clip_checkpoint(own)
    converted = {name: tensor for name, tensor in converted.items() if not name.endswith(_COMPUTED)}
    if not encoder.has_projection:
        converted.pop("text_projection.weight", None)
    config = _config(f"its {encoder.module}", lambda: clip_config(encoder, _bare(_shapes(converted))))
    return Module(name=encoder.module, loader=clip_loader(encoder), config=config, tensors=converted)


def _config(what: str, read: Callable[[], Config]) -> Config:
    try:
        return read()
    except (KeyError, StopIteration, IndexError) as error:
        missing = f": {error.args[0]}" if error.args else ""
        raise BrokenCheckpointError(f"{what} lacks tensors{missing}") from error


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _bare(shapes: Shapes) -> Shapes:
    return {bare_name(name): shape for name, shape in shapes.items()}


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def checked(module: Module) -> Module:
    """The module without superfluous tensors. Raises BrokenCheckpointError if its class has others, or other shapes."""
    expected = expected_shapes(module.loader, module.config)
    given = {bare_name(name): tuple(tensor.shape) for name, tensor in module.tensors.items() if tensor is not None}
    missing = sorted(expected.keys() - given.keys())
    if missing:
        raise BrokenCheckpointError(f"its {module.name} lacks {len(missing)} tensors, for example {missing[0]}")
    wrong = sorted(name for name, shape in expected.items() if given[name] != shape)
    if wrong:
        shapes = f"{given[wrong[0]]} instead of {expected[wrong[0]]}"
        raise BrokenCheckpointError(
            f"its {module.name} has {len(wrong)} tensors of another shape, for example {wrong[0]}: {shapes}"
        )
    for name in [name for name in module.tensors if bare_name(name) not in expected]:
        del module.tensors[name]
    return module


def expected_shapes(loader: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a module must be given, by their bare names; `loader` is its class.

    A tensor that it has under two names, such as embeddings that are its head, too, has the first alone.
    Raises BrokenCheckpointError for a config that the class does not take.
    """
    library, name = loader.split(".")
    kind: Any = getattr(importlib.import_module(library), name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers deprecates what it makes Chroma's transformer of
            made = kind.from_config(config) if library == "diffusers" else kind(kind.config_class(**config))
    except Exception as error:  # both libraries and torch raise their own errors
        raise BrokenCheckpointError(f"its config does not fit {name} ({first_line(error)})") from error
    second = dict(made.named_parameters(remove_duplicate=False)).keys() - dict(made.named_parameters()).keys()
    return {
        bare_name(key): tuple(tensor.shape)
        for key, tensor in made.state_dict().items()
        if key not in second and not key.endswith(_COMPUTED)
    }


class NoCopies(TorchFunctionMode):
    """Let conversion return views where diffusers' code copies, and note which tensors were used."""

    def __init__(self) -> None:
        super().__init__()
        self._used: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.clone, torch.Tensor.contiguous):
            return args[0]
        if function is torch.cat:
            if len(args[0]) == 1:
                return args[0][0]
            self.add_all(args[0])
        if function is torch.split and isinstance(args[1], tuple):
            args = (args[0], _in_proportion(args[1], args[0].shape[0]))
        return function(*args, **(kwargs or {}))

    def add_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note that these are used."""
        self._used |= {_storage(tensor) for tensor in tensors if tensor is not None}

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor, or a view of it, was used."""
        return _storage(tensor) in self._used


def _in_proportion(sizes: tuple[int, ...], length: int) -> list[int]:
    """Sizes that add up to `length`: diffusers' code has those of FLUX.1's published width."""
    return [size * length // sum(sizes) for size in sizes]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
