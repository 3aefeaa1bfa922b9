"""Weights outside the ONNX file: in the checkpoint's own safetensors files, linked beside it.

Only values that the checkpoint does not hold in this form are written: changed ones, and those in other formats. A
tensor that the checkpoint stores in another precision is linked as it is and cast in the graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnxscript.ir as ir
import torch

from hypergen_export.checkpoints.files import link_or_copy
from hypergen_export.checkpoints.weights import StoredTensor, stored_tensors
from hypergen_export.conversion.sources import LARGEST_LOADED, Placeholders, Source, write_sources
from hypergen_export.errors import ConversionError

_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


class WeightFiles:
    """The files with the weights of the ONNX file `onnx`, in its folder."""

    def __init__(self, onnx: Path) -> None:
        self._folder = onnx.parent
        self._written = onnx.with_name(f"{onnx.name}.safetensors")
        self._placed: dict[str, StoredTensor] = {}

    def place(self, sources: Iterable[Source], dtype: torch.dtype) -> None:
        """Link the sources' files, and write those that have none in `dtype`. Raises OSError."""
        new = {source.name: source for source in sources if source.name not in self._placed}.values()
        for file in {source.stored.file for source in new if source.stored}:
            # Files in the hub's cache are symbolic links.
            link_or_copy(Path(os.path.realpath(file)), self._folder / file.name)
        self._placed |= {source.name: source.stored for source in new if source.stored}
        written = [source for source in new if source.stored is None]
        if written:
            self._placed |= write_sources(self._written, written, dtype)

    def tensor(self, source: Source) -> ir.ExternalTensor:
        """The values of a placed source, as ONNX refers to them."""
        placed = self._placed[source.name]
        return ir.ExternalTensor(
            location=placed.file.name,
            offset=placed.offset,
            length=placed.length,
            dtype=_TYPES[placed.dtype],
            shape=ir.Shape(placed.shape),
            name=placed.name,
            base_dir=self._folder,
        )


def link_weights(model: ir.Model, placeholders: Placeholders, files: WeightFiles, dtype: torch.dtype) -> None:
    """Let the initializers that are placeholders refer to the weights' files.

    Raises:
        ConversionError: a wrapper computes with weights that are not loaded.
        OSError: the files cannot be linked, copied or written.
    """
    found = {value: _source(value, placeholders) for value in model.graph.initializers.values()}
    sources = {value: source for value, source in found.items() if source}
    files.place(sources.values(), dtype)
    linked: dict[str, ir.Value] = {}
    for value, source in sources.items():
        if source.name not in linked:  # tied weights have two names
            linked[source.name] = _add_linked(model.graph, files.tensor(source), value)
        value.replace_all_uses_with(linked[source.name])
        if value.name is not None and model.graph.initializers.get(value.name) is value:
            del model.graph.initializers[value.name]


def check_links(onnx: Path) -> None:
    """Check each external initializer of an ONNX file against the header of the file that it refers to.

    Raises ConversionError.
    """
    headers: dict[str, dict[str, StoredTensor]] = {}
    for value in ir.load(onnx).graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        if location not in headers:
            headers[location] = stored_tensors(onnx.parent / location)
        stored = headers[location].get(str(value.name))
        given = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.offset, tensor.length)
        if stored is None or given != (_TYPES[stored.dtype], stored.shape, stored.offset, stored.length):
            raise ConversionError(f"{onnx.parent.parent.name}: {value.name} is not where the ONNX file says")


def _source(value: ir.Value, placeholders: Placeholders) -> Source | None:
    """The source of an initializer that is a placeholder."""
    raw = getattr(value.const_value, "raw", None)
    if not isinstance(raw, torch.Tensor):
        return None
    source = placeholders.find(raw)
    changed = raw.numel() > LARGEST_LOADED and raw.is_floating_point() and bool(raw.view(-1)[0].isnan())
    if (source is None and changed) or (source and tuple(raw.shape) != source.shape):
        raise ConversionError(f"{value.name}: is computed from weights, which an export does not load")
    return source


def _add_linked(graph: ir.Graph, tensor: ir.ExternalTensor, value: ir.Value) -> ir.Value:
    """Add an initializer; returns it, or its cast to the type of `value`."""
    stored = ir.Value(name=tensor.name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(stored)
    if value.dtype in (None, tensor.dtype):
        return stored
    cast = ir.node("Cast", [stored], {"to": value.dtype})
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, value.dtype
    graph.insert_before(graph[0], cast)
    return cast.outputs[0]
