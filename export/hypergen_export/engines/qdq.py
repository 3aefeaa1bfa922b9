"""Q/DQ: an ONNX graph states with QuantizeLinear and DequantizeLinear which layers compute with eight bits.

Before each of these layers its input is quantised with one scale and dequantised again, and its weights are stored in
eight bits with a scale for each output channel and dequantised. An engine's builder takes such a pair together with the
layer for one in eight bits. Everything else stays in the graph's own type, biases too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnxscript import ir
from onnxscript.ir.passes.common import RemoveUnusedNodesPass

from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.weights import StoredTensor
from hypergen_export.conversion.linking import checkpoint_name
from hypergen_export.conversion.sources import Source, write_sources
from hypergen_export.engines.accuracy import Array
from hypergen_export.engines.formats import FORMATS, Format
from hypergen_export.errors import ConversionError

# The first opset that quantises bfloat16, and to numbers of fp8.
_OPSET = 19
_TYPES = {torch.int8: ir.DataType.INT8, torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN}
# Where torch's exporter states the modules that a node comes from, the outermost first, and then the operation.
_SCOPES = "pkg.torch.onnx.name_scopes"


def quantize_graph(component: Component, onnx: Path, dtype: str, magnitudes: Mapping[str, float]) -> None:
    """Rewrite an ONNX file so that the named layers compute in `dtype`, with weights in a file beside it.

    `magnitudes` are the largest values of each layer's input. Raises ConversionError, OSError.
    """
    model = ir.load(onnx)
    layers = [layer for node in model.graph if (layer := _find_layer(node)) and layer.name in magnitudes]
    missing = magnitudes.keys() - {layer.name for layer in layers}
    if missing:
        raise ConversionError(f"{component.name}: its graph lacks {len(missing)} of its layers, such as {min(missing)}")
    form = FORMATS[dtype]
    stored = _write_weights(layers, form, onnx.with_name(f"{onnx.name}.{dtype}.safetensors"))
    # Several layers may read the same values, and a layer may be called twice.
    inputs: dict[tuple[ir.Value, float], ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    for layer in layers:
        key = layer.input, magnitudes[layer.name]
        if key not in inputs:
            inputs[key] = _add_input(model.graph, layer, form, magnitudes[layer.name])
        if layer.name not in weights:
            weights[layer.name] = _add_weights(model.graph, layer, *stored[layer.name])
        layer.node.replace_input_with(0, inputs[key])
        layer.node.replace_input_with(1, weights[layer.name])
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[""] = _OPSET
    ir.save(model, onnx)


@dataclass(frozen=True)
class _Layer:
    """A linear layer or convolution: its module, its node, the initializer with its weights, how it is transposed."""

    name: str
    node: ir.Node
    stored: ir.Value
    permutations: tuple[tuple[int, ...], ...]

    @property
    def input(self) -> ir.Value:
        given = self.node.inputs[0]
        assert given is not None
        return given

    @property
    def dtype(self) -> ir.DataType:
        """The type of what it reads, in which the graph computes."""
        assert self.input.dtype is not None
        return self.input.dtype

    @property
    def channel_axis(self) -> int:
        """The axis of output channels in the weights as the node reads them."""
        is_transposed = "transB" in self.node.attributes and self.node.attributes["transB"].as_int()
        return 0 if self.node.op_type == "Conv" or is_transposed else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights as the node reads them."""
        assert self.stored.shape is not None
        shape = self.stored.shape.numpy()
        for permutation in self.permutations:
            shape = tuple(shape[axis] for axis in permutation)
        return shape

    def weights(self) -> torch.Tensor:
        """The weights as the node reads them."""
        assert self.stored.const_value is not None
        values = torch.from_numpy(_values(self.stored.const_value).astype(np.float32))
        for permutation in self.permutations:
            values = values.permute(permutation)
        return values

    def quantized_weights(self, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in eight bits, and the scale of each output channel."""
        values = self.weights()
        scales = form.weight_scales(values.movedim(self.channel_axis, 0))
        shape = [-1 if axis == self.channel_axis else 1 for axis in range(values.ndim)]
        return form.quantize(values, scales.reshape(shape)), scales


def _values(tensor: ir.TensorProtocol) -> Array:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    # Not by itself: it refuses files with several links, as the checkpoint's are.
    values = np.fromfile(tensor.path, tensor.dtype.numpy(), tensor.size, offset=tensor.offset or 0)
    return values.reshape(tensor.shape.numpy())


def _find_layer(node: ir.Node) -> _Layer | None:
    """A node as a layer; None if it is none, or if its weights are computed."""
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return None
    value, permutations = node.inputs[1], list[tuple[int, ...]]()
    while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Cast", "Transpose"):
        if maker.op_type == "Transpose":
            permutations.insert(0, tuple(maker.attributes["perm"].as_ints()))
        value = maker.inputs[0]
    if value is None or value.const_value is None:
        return None
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))
    return _Layer(checkpoint_name(scopes[-2]), node, value, tuple(permutations))


def _write_weights(layers: list[_Layer], form: Format, file: Path) -> dict[str, tuple[ir.ExternalTensor, torch.Tensor]]:
    """Write each layer's weights, one after another; returns where they are, and their scales, by the layer's name."""
    scales: dict[str, torch.Tensor] = {}

    def read(layer: _Layer) -> torch.Tensor:
        values, scales[layer.name] = layer.quantized_weights(form)
        return values

    sources = {
        layer.name: Source(name=layer.name, shape=layer.shape, read=functools.partial(read, layer)) for layer in layers
    }
    written = write_sources(file, sources.values(), form.dtype)
    return {name: (_external(name, tensor, form, file), scales[name]) for name, tensor in written.items()}


def _external(name: str, stored: StoredTensor, form: Format, file: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location=file.name,
        offset=stored.offset,
        length=stored.length,
        dtype=_TYPES[form.dtype],
        shape=ir.Shape(stored.shape),
        name=f"{name}.quantized_weight",
        base_dir=file.parent,
    )


def _add_input(graph: ir.Graph, layer: _Layer, form: Format, magnitude: float) -> ir.Value:
    """A layer's input, quantised and dequantised."""
    kind = _TYPES[form.dtype]
    name = f"{layer.name}.{layer.input.name}"
    scale = _add_constant(graph, f"{name}.scale", _in_type(form.scale(torch.tensor(magnitude)), layer))
    zero = _add_constant(graph, f"{name}.zero", ir.tensor(np.zeros((), kind.numpy()), kind))
    quantize = ir.node("QuantizeLinear", [layer.input, scale, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    for node, dtype in ((quantize, kind), (dequantize, layer.dtype)):
        node.outputs[0].dtype, node.outputs[0].shape = dtype, layer.input.shape
    graph.insert_before(layer.node, [quantize, dequantize])
    return dequantize.outputs[0]


def _add_weights(graph: ir.Graph, layer: _Layer, stored: ir.ExternalTensor, scales: torch.Tensor) -> ir.Value:
    """A layer's stored weights, dequantised."""
    weights = _add_constant(graph, str(stored.name), stored)
    columns = _add_constant(graph, f"{layer.name}.weight_scales", _in_type(scales, layer))
    dequantize = ir.node("DequantizeLinear", [weights, columns], {"axis": layer.channel_axis})
    dequantize.outputs[0].dtype, dequantize.outputs[0].shape = layer.dtype, weights.shape
    graph.insert_before(layer.node, dequantize)
    return dequantize.outputs[0]


def _in_type(scales: torch.Tensor, layer: _Layer) -> ir.TensorProtocol:
    """Scales in the type of what the layer reads."""
    return ir.tensor(scales.numpy().astype(layer.dtype.numpy()), layer.dtype)


def _add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
