"""Load a checkpoint's modules in torch, in float32, and check that all weights come from its files.

`load_module` is the libraries' own way, for comparison. `load_placeholders` leaves large tensors out: an export needs
their names and shapes alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.conversion.sources import LARGEST_LOADED, Placeholders, Source, read_sources
from hypergen_export.errors import BrokenCheckpointError, first_line

State = dict[str, torch.Tensor]


def load_module(checkpoint: Checkpoint, component: Component) -> torch.nn.Module:
    """The torch module of `component`. Raises BrokenCheckpointError."""
    folder = checkpoint.folder_of(component.module)
    weights = checkpoint.weights(component.module)
    library, name = component.loader.split(".")
    loader: Any = getattr(importlib.import_module(library), name)
    try:
        module, report = loader.from_pretrained(
            folder,
            variant=weights.variant or None,
            use_safetensors=weights.format == "safetensors",
            local_files_only=True,
            # Instead of the config's dtype, which would round more precise weights.
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, pickle, torch and both libraries raise their own errors
        raise BrokenCheckpointError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
    _check_complete(folder, report["missing_keys"])
    loaded: torch.nn.Module = module.float().eval().requires_grad_(False)
    broken = next((name for name, tensor in loaded.state_dict().items() if not tensor.isfinite().all()), None)
    if broken:  # every image would be black
        raise BrokenCheckpointError(f"{folder}: the weights are not finite ({broken})")
    return loaded


def load_placeholders(checkpoint: Checkpoint, component: Component) -> tuple[torch.nn.Module, Placeholders]:
    """The torch module of `component` in float32, with placeholders for its large tensors.

    Every tensor is read once, to check its values. Raises BrokenCheckpointError.
    """
    folder = checkpoint.folder_of(component.module)
    placeholders = Placeholders()
    library, name = component.loader.split(".")
    try:
        sources = read_sources(folder, checkpoint.weights(component.module))
        state = {name: _tensor(source, component, placeholders) for name, source in sources.items()}
        module, missing = _LOADERS[library](getattr(importlib.import_module(library), name), folder, state)
    except Exception as error:  # safetensors, pickle, torch and both libraries raise their own errors
        raise BrokenCheckpointError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
    _check_complete(folder, missing)
    for name, tensor in module.state_dict().items():
        source = placeholders.find(tensor)
        if not _is_finite(tensor if source is None else source.read()):
            raise BrokenCheckpointError(f"{folder}: the weights are not finite ({name})")
    return module.eval().requires_grad_(False), placeholders


def _tensor(source: Source, component: Component, placeholders: Placeholders) -> torch.Tensor:
    is_large = torch.Size(source.shape).numel() > LARGEST_LOADED
    if is_large and not source.name.endswith(component.computed_with):
        return placeholders.make(source)
    return source.read().float()


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters are made by `torch.empty`; on the device meta they take no memory. Buffers are computed as usual."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        meta = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **meta})


def _load_diffusers(loader: Any, folder: Path, state: State) -> tuple[torch.nn.Module, Iterable[str]]:
    """As `from_pretrained` does, which takes files alone; returns the module and the tensors that it lacks."""
    with _EmptyOnMeta():
        module = loader.from_config(loader.load_config(folder, local_files_only=True))
    module._fix_state_dict_keys_on_load(state)  # former names of attention layers
    return module, module.load_state_dict(state, strict=False, assign=True).missing_keys


def _load_transformers(loader: Any, folder: Path, state: State) -> tuple[torch.nn.Module, Iterable[str]]:
    config = loader.config_class.from_pretrained(folder, local_files_only=True)
    module, report = loader.from_pretrained(
        None, config=config, state_dict=state, torch_dtype=torch.float32, output_loading_info=True
    )
    return module, report["missing_keys"]


_LOADERS: Mapping[str, Callable[[Any, Path, State], tuple[torch.nn.Module, Iterable[str]]]] = {
    "diffusers": _load_diffusers,
    "transformers": _load_transformers,
}


def _check_complete(folder: Path, missing: Iterable[str]) -> None:
    """Raise BrokenCheckpointError if tensors are missing: transformers would use random numbers instead."""
    names = sorted(missing)
    if names:
        raise BrokenCheckpointError(f"{folder}: the weights lack {len(names)} tensors, for example {names[0]}")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. The extremes of a tensor are not numbers if one of its values is none."""
    return tensor.numel() == 0 or all(extreme.isfinite().item() for extreme in torch.aminmax(tensor))
