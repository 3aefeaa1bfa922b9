"""torch to ONNX: a wrapped component becomes a file with free batch, height and width.

It knows torch.export and the exporter of torch; what a component's axes are stands in the table.
"""

from __future__ import annotations

import errno
from pathlib import Path

import onnxscript.optimizer
import torch
from onnxscript import ir
from torch.export import Dim, ExportedProgram

from hypergen_export.checkpoints.components import Component, Sizes
from hypergen_export.conversion.examples import by_name, example_inputs
from hypergen_export.errors import ConversionError, first_line

# The version that torch's translations are written for: no conversion afterwards. Measured with OpenVINO on a UNet
# of 16 M parameters, 8×8 latents, batch 2 and 16, bfloat16: opset 18 took 11 and 45 ms, opset 21 (GroupNormalization
# as one operator) and 23 (Attention as one too) took 14 and 63 ms.
OPSET = 18
# No batch of one and no even sizes: torch would take what holds for the example alone for a rule.
_EXAMPLE = {"batch": 3, "height": 14, "width": 10}


def capture(component: Component, wrapped: torch.nn.Module, sizes: Sizes) -> ExportedProgram:
    """The component's graph, free in the axes that the table says. Raises ConversionError."""
    inputs = by_name(component, example_inputs(component, sizes, **_EXAMPLE))
    free = {tensor.name: dict.fromkeys(tensor.free_axes(), Dim.DYNAMIC) for tensor in component.inputs}
    try:
        with torch.no_grad():
            return torch.export.export(wrapped, (), inputs, dynamic_shapes=free, strict=False)
    except Exception as error:  # torch.export documents no error of its own
        raise ConversionError(f"{component.name}: torch.export failed ({first_line(error)})") from error


def write_onnx(component: Component, program: ExportedProgram, path: Path) -> None:
    """Write the graph to `path`; weights beyond ONNX's 2 GB go beside it. Raises ConversionError, OSError."""
    try:
        converted = torch.onnx.export(
            program,
            input_names=[tensor.name for tensor in component.inputs],
            output_names=[tensor.name for tensor in component.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert converted is not None  # None is what the exporter without dynamo returns
        # What torch would do twice: the second round costs as much and removes 50 of a UNet's 1,300 nodes.
        onnxscript.optimizer.optimize_ir(converted.model, num_iterations=1)
        resize_in_float32(converted.model)
        # Not external unless it must be: then a component is one file. `save` knows the limit.
        converted.save(path, external_data=False)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConversionError(f"{component.name}: torch.onnx failed ({first_line(error)})") from error


def resize_in_float32(model: ir.Model) -> None:
    """Put casts around every Resize of bfloat16, of which TensorRT has none; nearest neighbours come out the same."""
    resizes = [node for node in model.graph if node.op_type == "Resize"]
    for node in resizes:
        if node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        widened = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
        narrowed = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.BFLOAT16})
        node.outputs[0].replace_all_uses_with(narrowed.outputs[0])
        narrowed.replace_input_with(0, node.outputs[0])  # its own use was replaced too
        node.replace_input_with(0, widened.outputs[0])
        node.outputs[0].dtype, narrowed.outputs[0].dtype = ir.DataType.FLOAT, ir.DataType.BFLOAT16
        model.graph.insert_before(node, widened)
        model.graph.insert_after(node, narrowed)
