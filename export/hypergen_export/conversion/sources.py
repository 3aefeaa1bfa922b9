"""Tensors without values in place of a module's large ones, and where the values of each are.

A placeholder is one element, expanded to the tensor's shape: it takes no memory, and torch traces it like any other
tensor. It is recognised by its storage, so also in a wrapper that moves modules, under two names, and in a traced
program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hypergen_export.checkpoints.weights import StoredTensor, Weights, stored_tensors, tensor_files

# Elements of the largest tensor that is loaded: the optimizer of ONNX files folds operations on small ones.
LARGEST_LOADED = 2**16
# safetensors' names of types.
TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Types that engines read; tensors of others are converted.
_LINKED = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a tensor's values are: `read` returns them, in any precision.

    `name` is the tensor's in the checkpoint. `stored` is its place there if an engine can read it, None if the values
    are changed or stored in another format.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    stored: StoredTensor | None = None


class Placeholders:
    """The placeholders of a module and their sources."""

    def __init__(self) -> None:
        # The tensors are kept, as the address of a freed one could be reused.
        self._made: dict[int, tuple[Tensor, Source]] = {}

    def make(self, source: Source, dtype: torch.dtype = torch.float32) -> Tensor:
        """A placeholder. Its value is not a number: a result that depends on it is recognised."""
        element = torch.full((1,), torch.nan, dtype=dtype)
        self._made[_address(element)] = element, source
        return element.expand(source.shape)

    def find(self, tensor: Tensor) -> Source | None:
        """The source of a placeholder or a view of one; None for any other tensor."""
        _, source = self._made.get(_address(tensor), (None, None))
        return source

    def change(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Change a placeholder's values: `function` receives them in float32 and returns them in the same shape."""
        element, source = self._made[_address(tensor)]
        changed = replace(source, read=lambda: function(source.read().float()), stored=None)
        self._made[_address(tensor)] = element, changed

    def cast(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        """Give the module's floating-point parameters and buffers a type, like `module.to(dtype)`."""
        for tensor in (*module.parameters(), *module.buffers()):
            source = self.find(tensor)
            if source is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = self.make(source, dtype)
        # Last, as it also makes new tensors of buffers: those that are views would keep a base of the former type, with
        # which torch.export fails.
        module.to(dtype)

    def load(self, module: torch.nn.Module) -> None:
        """Replace the placeholders that the module has by their values, in the precision of each."""
        for tensor in (*module.parameters(), *module.buffers()):
            source = self.find(tensor)
            if source is not None:
                tensor.data = source.read().to(tensor.dtype)


def read_sources(folder: Path, weights: Weights) -> dict[str, Source]:
    """The sources of a module's tensors, by their names in its files.

    Raises ValueError, OSError, and torch's errors for files that are not safetensors.
    """
    sources: dict[str, Source] = {}
    for path in tensor_files(folder, weights):
        sources |= _stored_sources(path) if weights.format == "safetensors" else _pickled_sources(path)
    return sources


def read_stored(stored: StoredTensor) -> Tensor:
    """The values of a stored tensor, in its own type. Raises KeyError for a type that torch does not have, OSError."""
    # Not a memory map: its pages would count as this process's memory as long as a tensor of the file exists.
    content = np.fromfile(stored.file, np.uint8, stored.length, offset=stored.offset)
    return torch.from_numpy(content).view(TYPES[stored.dtype]).reshape(stored.shape)


def write_sources(
    path: Path, sources: Iterable[Source], dtype: torch.dtype, report: Callable[[int], None] = lambda _: None
) -> dict[str, StoredTensor]:
    """Write the values of the sources to a safetensors file, one tensor at a time; returns their places by name.

    `report` hears the bytes of each.
    """
    _write(path, [(source.name, dtype, source.shape, source.read) for source in sources], report)
    return stored_tensors(path)


def write_tensors(path: Path, tensors: Mapping[str, tuple[Tensor, torch.dtype]], report: Callable[[int], None]) -> None:
    """Write tensors, each in its type, to a safetensors file, one at a time; `report` hears the bytes of each."""
    _write(
        path,
        [(name, dtype, tuple(tensor.shape), partial(_same, tensor)) for name, (tensor, dtype) in tensors.items()],
        report,
    )


def _write(
    path: Path,
    tensors: list[tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]],
    report: Callable[[int], None],
) -> None:
    """Write a safetensors file, reading each tensor when its turn comes."""
    names = {dtype: name for name, dtype in TYPES.items()}
    ends = np.cumsum([0, *(math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in tensors)]).tolist()
    header = {
        name: {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        for (name, dtype, shape, _), begin, end in zip(tensors, ends[:-1], ends[1:], strict=True)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns the tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, _, read in tensors:
            content = read().to(dtype).contiguous().view(torch.uint8).numpy()
            file.write(content.data)
            report(content.nbytes)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _stored_sources(path: Path) -> dict[str, Source]:
    return {
        name: Source(
            name=name,
            shape=stored.shape,
            read=lambda stored=stored: read_stored(stored),  # type: ignore[misc]
            stored=stored if stored.dtype in _LINKED else None,
        )
        for name, stored in stored_tensors(path).items()
    }


def _pickled_sources(path: Path) -> dict[str, Source]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # torch's format before 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {
        name: Source(name=name, shape=tuple(tensor.shape), read=lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }
