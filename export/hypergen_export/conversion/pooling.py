"""A rank pool in a module: branches beside its layers, and the file with their weights.

The file lies beside the ONNX file, which refers to it, and is written again whenever other LoRAs are served: names,
shapes, types and offsets stay, so nothing is converted. Beside it are the names of the module's layers, so that no
module has to be built for that. An empty column is zero.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypergen_export.checkpoints.components import POOL_FILE, LoraPool
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.checkpoints.weights import stored_tensors
from hypergen_export.conversion.layer_names import has_matrix, layer_names
from hypergen_export.conversion.lora_changes import does_not_fit, read_changes, read_weights, sketch_weights
from hypergen_export.conversion.sources import TYPES, Source, read_stored, write_sources
from hypergen_export.errors import BadLoraError

_LAYERS_FILE = "lora_pool.json"
_SCALES = "lora_scales"
# Standard deviation of the examples' change, relative to what a layer computes.
_EXAMPLE_STRENGTH = 0.1


@dataclass(frozen=True)
class PoolWeights:
    """A pool's files in a component's version folder."""

    folder: Path

    @property
    def file(self) -> Path:
        """The weights, to which the ONNX file refers."""
        return self.folder / POOL_FILE

    def create(self, name: str, module: nn.Module, pool: LoraPool, dtype: torch.dtype) -> None:
        """Write the files for the checkpoint's module `name`, with random weights: an export is compared by them."""
        pooled = dict(_pooled_layers(module, pool))
        shapes = {path: list(layer.get_parameter("weight").shape) for path, layer in pooled.items()}
        own = {"module": name, "class": type(module).__name__, "rank": pool.rank}
        layers = {**own, "shapes": shapes, "names": layer_names(module)}
        self.folder.joinpath(_LAYERS_FILE).write_text(json.dumps(layers), encoding="utf-8")
        generator = torch.Generator().manual_seed(0)
        examples = [
            Source(name=name, shape=shape, read=partial(_example, shape, generator))
            for name, shape in _shapes(shapes, pool.rank).items()
        ]
        self._write(examples, dtype)

    def fill(self, placements: Iterable[Placement]) -> None:
        """Replace the weights by those of the LoRAs. Raises BadLoraError, OSError."""
        tensors = self.empty()
        for placement in placements:
            self.place(placement, tensors)
        self.write(tensors)

    @property
    def module(self) -> str:
        """The checkpoint's module that has the pool."""
        module: str = self._layers["module"]
        return module

    @property
    def rank(self) -> int:
        """The pool's columns."""
        rank: int = self._layers["rank"]
        return rank

    def empty(self) -> dict[str, Tensor]:
        """A pool without LoRAs, in float32."""
        return {name: torch.zeros(shape) for name, shape in _shapes(self._layers["shapes"], self.rank).items()}

    def read(self) -> dict[str, Tensor]:
        """The pool as it is, in float32."""
        return {name: source.read().float() for name, source in self.sources().items()}

    def place(self, placement: Placement, tensors: Mapping[str, Tensor]) -> None:
        """Set a LoRA's columns, if it changes the module. Raises BadLoraError."""
        if self.module not in placement.lora.modules:
            return
        for path, down, up in _read_factors(self.module, placement.lora, self._layers, self._dtype):
            # A layer's own rank may be smaller than the file's largest one.
            columns = list(placement.columns[: len(down)])
            all_down, all_up = _columns_first(path, tensors)
            all_down[columns], all_up[columns] = down, up.T.reshape(len(down), *all_up.shape[1:])

    def check(self, lora: Lora) -> None:
        """Raise BadLoraError for a LoRA that cannot be placed, as far as its header tells."""
        if self.module in lora.modules:
            for _ in _factors(self.module, lora, self._layers, sketch_weights):
                pass

    def clear(self, columns: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Set columns to zero."""
        for path in self._layers["shapes"]:
            for view in _columns_first(path, tensors):
                view[list(columns)] = 0.0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file, in the precision that it has. Raises OSError."""
        sources = [
            Source(name=name, shape=tuple(tensor.shape), read=lambda tensor=tensor: tensor)  # type: ignore[misc]
            for name, tensor in tensors.items()
        ]
        self._write(sources, self._dtype)

    def sources(self) -> dict[str, Source]:
        """The weights by their names in the file."""
        return {
            name: Source(name=name, shape=stored.shape, read=lambda stored=stored: read_stored(stored), stored=stored)  # type: ignore[misc]
            for name, stored in stored_tensors(self.file).items()
        }

    @cached_property
    def _dtype(self) -> torch.dtype:
        return TYPES[next(iter(stored_tensors(self.file).values())).dtype]

    @cached_property
    def _layers(self) -> Mapping[str, Any]:
        layers: Mapping[str, Any] = json.loads(self.folder.joinpath(_LAYERS_FILE).read_text(encoding="utf-8"))
        return layers

    def _write(self, sources: Iterable[Source], dtype: torch.dtype) -> None:
        # Not in place: another export may share the file, or an engine may be reading it.
        new = self.file.with_name(f".{POOL_FILE}.new")
        write_sources(new, sources, dtype)
        new.replace(self.file)


def add_pool(module: nn.Module, pool: LoraPool, weights: Callable[[str], Tensor]) -> PoolScales:
    """Add the pool's branches to the module's layers; `weights` returns a tensor of the pool's file by its name."""
    scales = PoolScales()
    for path, layer in _pooled_layers(module, pool):
        down, up = (nn.Parameter(weights(name), requires_grad=False) for name in _names(path))
        layer.register_parameter("lora_down", down)
        layer.register_parameter("lora_up", up)
        layer.register_forward_hook(scales.add_branch)
    return scales


class PoolScales:
    """The scales [B, R] of the images of a call, which all branches of a module read."""

    values: Tensor

    def add_branch(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A layer's output with that of its branch."""
        sample: Tensor = inputs[0]
        down, up = layer.get_parameter("lora_down"), layer.get_parameter("lora_up")
        scales = self.values.to(sample.dtype)
        if isinstance(layer, nn.Linear):
            # down [in, R], up [R, out]: as they are multiplied, so that no engine has to transpose them.
            columns = scales.reshape(-1, *[1] * (sample.dim() - 2), scales.shape[-1])
            branch: Tensor = ((sample @ down) * columns) @ up
        else:
            columns = nn.functional.conv2d(sample, down, None, layer.stride, layer.padding, layer.dilation)
            branch = nn.functional.conv2d(columns * scales[:, :, None, None], up)
        return output + branch


class Pooled(nn.Module):
    """A wrapper with the input `lora_scales` [B, R] beside its own."""

    def __init__(self, wrapped: nn.Module, scales: PoolScales) -> None:
        super().__init__()
        self.wrapped = wrapped

        def forward(**inputs: Tensor) -> Any:
            scales.values = inputs.pop(_SCALES)
            return wrapped(**inputs)

        # torch reads the names of a graph's inputs from the signature.
        own = inspect.signature(wrapped.forward)
        added = inspect.Parameter(_SCALES, inspect.Parameter.KEYWORD_ONLY)
        forward.__signature__ = own.replace(parameters=[*own.parameters.values(), added])  # type: ignore[attr-defined]
        self.forward = forward


def _pooled_layers(module: nn.Module, pool: LoraPool) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of each layer with a branch."""
    for path, layer in module.named_modules():
        is_kernel = isinstance(layer, nn.Conv2d) and set(layer.kernel_size) != {1}
        if has_matrix(layer) and (pool.kernels or not is_kernel):
            yield path, layer


def _names(path: str) -> tuple[str, str]:
    return f"lora_pool.{path}.down", f"lora_pool.{path}.up"


def _shapes(layers: Mapping[str, list[int]], rank: int) -> dict[str, tuple[int, ...]]:
    """The pool's tensors for layers with weights of these shapes: name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (outputs, inputs, *kernel) in layers.items():
        down, up = _names(path)
        shapes[down] = (rank, inputs, *kernel) if kernel else (inputs, rank)
        shapes[up] = (outputs, rank, 1, 1) if kernel else (rank, outputs)
    return shapes


def _example(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random weights, of a size at which a branch changes what its layer computes by about a tenth."""
    summed = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
    return torch.randn(shape, generator=generator) * math.sqrt(_EXAMPLE_STRENGTH / summed)


def _read_factors(
    module: str, lora: Lora, layers: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, down and up of each layer, of values that are finite as `dtype`. Raises BadLoraError."""
    for path, *factors in _factors(module, lora, layers, read_weights):
        down, up = _balance(*factors)
        # An infinite number in a pool would be NaN in images that do not use the LoRA, too: their scale is 0.
        if not (down.to(dtype).isfinite().all() and up.to(dtype).isfinite().all()):
            raise BadLoraError(f"{lora.file}: its weights times alpha are not finite at {path}")
        yield path, down, up


def _factors(
    module: str, lora: Lora, layers: Mapping[str, Any], read: Callable[[Lora], Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, down and up of each layer. Raises BadLoraError."""
    for path, change in read_changes(module, layers["class"], lora, layers["names"], read).items():
        if path not in layers["shapes"]:
            raise BadLoraError(f"{lora.file}: changes convolutions such as {path}, which have no rank pool here")
        try:
            yield path, *change.factors(layers["shapes"][path])
        except RuntimeError as error:
            raise does_not_fit(module, lora, f"the weights' shapes differ at {path}") from error


def _balance(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of factors of about one size, for float16: alpha may make `up` overflow, or round it to zero.

    They are multiplied by powers of two, which rounds nothing.
    """
    ratio = (up.abs().amax() / down.abs().amax()).item() if down.any() and up.any() else 1.0
    if not 0 < ratio < math.inf:  # not finite, which is reported with its layer
        return down, up
    factor = 2.0 ** round(math.log2(ratio) / 2)
    return down * factor, up / factor


def _columns_first(path: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Views of a layer's `down` and `up` whose first axis is the pool's columns."""
    down, up = (tensors[name] for name in _names(path))
    return (down.T, up) if down.dim() == 2 else (down, up.transpose(0, 1))
