"""Tensors of a single file, as views of the mapped file: they take no memory of their own. Pickles are never run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypergen_export.checkpoints.weights import safetensors_header, stored_tensors, wrong_content
from hypergen_export.conversion.sources import TYPES
from hypergen_export.errors import BrokenCheckpointError, UnsupportedModelError, first_line

Tensors = dict[str, torch.Tensor]
# Precisions that engines do not read, and one that holds all their values.
_WIDER = {
    torch.float8_e4m3fn: torch.bfloat16,
    torch.float8_e5m2: torch.bfloat16,
    torch.float64: torch.float32,
}
# Packages whose objects training programs leave beside the weights. Their classes are not imported.
_LEFT_BY_TRAINING = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.", "collections.", "typing.")


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """The tensors of a file by their names there, and the texts of its metadata."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read_single_file(path: Path) -> SingleFile:
    """Map the tensors of a .safetensors or .ckpt file. Raises BrokenCheckpointError, UnsupportedModelError."""
    try:
        if path.suffix == ".safetensors":
            return SingleFile(path=path, tensors=map_safetensors(path), metadata=_metadata(path))
        reason = wrong_content(path)
        if reason:
            raise BrokenCheckpointError(f"{path}: the weights cannot be read ({reason})")
        return SingleFile(path=path, tensors=_flatten(_map_pickle(path)), metadata={})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BrokenCheckpointError(f"{path}: the weights cannot be read ({first_line(error)})") from error


def written_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a conversion writes tensors of a precision."""
    return _WIDER.get(dtype, dtype)


def map_safetensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file by name, mapped. Raises ValueError, KeyError, OSError."""
    # Copy-on-write, since torch has no read-only tensors; nobody writes.
    content = np.memmap(path, np.uint8, mode="c")
    return {
        name: torch.from_numpy(content[each.offset : each.offset + each.length])
        .view(TYPES[each.dtype])
        .reshape(each.shape)
        for name, each in stored_tensors(path).items()
    }


def _metadata(path: Path) -> dict[str, str]:
    stated = safetensors_header(path).get("__metadata__")
    return {str(name): str(text) for name, text in stated.items()} if isinstance(stated, dict) else {}


def _map_pickle(path: Path) -> Any:
    """The content of torch's format; objects other than tensors and plain values become inert ones."""
    from torch.serialization import safe_globals

    try:
        with safe_globals(_inert_classes(path)):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # torch's format before 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except UnsupportedModelError:
        raise
    except Exception as error:  # pickle, zipfile and torch raise their own errors
        raise BrokenCheckpointError(f"{path}: the weights cannot be read ({first_line(error)})") from error


def _inert_classes(path: Path) -> list[Any]:
    """For each object of training programs in the file, a class without behaviour under its name.

    Raises UnsupportedModelError for a file that names anything else, which may be an attack.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    names: list[str] = []
    with contextlib.suppress(ValueError):  # torch's format before 1.6, which weights_only checks alone
        names = get_unsafe_globals_in_checkpoint(str(path))
    foreign = [name for name in names if not name.startswith(_LEFT_BY_TRAINING)]
    if foreign:
        raise UnsupportedModelError(
            f"{path}: it is a pickle that would run {foreign[0]}, which is never done; use its .safetensors version"
        )
    return [(type("Inert", (_Inert,), {}), name) for name in names]


class _Inert:
    """An object of a pickle that is not rebuilt."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _flatten(content: Any) -> Tensors:
    """The tensors; some programs store them under "state_dict"."""
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError("it holds no tensors by name")
    return dict(_tensors_of(content))


def _tensors_of(content: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value.detach()
