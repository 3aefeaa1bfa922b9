"""Weights outside the ONNX file: in the checkpoint's own safetensors files, linked beside it.

Only values that the checkpoint does not hold in this form are written: changed ones, and those in other formats or
precisions. For an engine builder, a tensor in another precision is linked as it is and cast in the graph: the builder
computes the cast once. OpenVINO does so whenever it loads the file, and keeps the result: a UNet of 0.86 billion
parameters in float16, computed in bfloat16, takes 5.1 GB of anonymous memory then, instead of 2.3 GB.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import onnxscript.ir as ir
import torch

from hypergen_export.checkpoints.files import link_or_copy
from hypergen_export.checkpoints.weights import StoredTensor, stored_tensors
from hypergen_export.conversion.sources import LARGEST_LOADED, TYPES, Placeholders, Source, write_sources
from hypergen_export.errors import ConversionError

_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


class WeightFiles:
    """The files with the weights of the ONNX file `onnx`, in its folder.

    `casts`: tensors that are stored in another precision than the graph's are linked and cast, not written.
    """

    def __init__(self, onnx: Path, *, casts: bool) -> None:
        self._casts = casts
        self._folder = onnx.parent
        self._written = onnx.with_name(f"{onnx.name}.safetensors")
        self._placed: dict[str, StoredTensor] = {}

    def place(self, sources: Iterable[Source], dtype: torch.dtype) -> None:
        """Link the sources' files, and write those that have none in `dtype`. Raises OSError."""
        new = {source.name: source for source in sources if source.name not in self._placed}
        linked = {name: stored for name, source in new.items() if (stored := self._linkable(source, dtype))}
        for file in {stored.file for stored in linked.values()}:
            # Files in the hub's cache are symbolic links.
            if file.parent != self._folder:  # a rank pool is written beside the ONNX file
                link_or_copy(Path(os.path.realpath(file)), self._folder / file.name)
        self._placed |= linked
        written = [source for name, source in new.items() if name not in linked]
        if written:
            self._placed |= write_sources(self._written, written, dtype)

    def _linkable(self, source: Source, dtype: torch.dtype) -> StoredTensor | None:
        stored = source.stored
        return stored if stored and (self._casts or TYPES[stored.dtype] == dtype) else None

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
    # All of them first: a placeholder may have the name that its own or another weight has in the checkpoint.
    for value in sources:
        del model.graph.initializers[str(value.name)]
    linked: dict[str, ir.Value] = {}
    for value, source in sources.items():
        if source.name not in linked:  # tied weights have two names
            linked[source.name] = _add_linked(model.graph, files.tensor(source), value)
        value.replace_all_uses_with(linked[source.name])


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


def checkpoint_name(name: str) -> str:
    """What the checkpoint calls a module or tensor of a graph, which may have the name of its path in the wrapper."""
    return re.sub(r"^(unet|transformer|text_encoder)\.", "", name)


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
