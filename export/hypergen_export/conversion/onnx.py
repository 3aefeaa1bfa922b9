"""Export a wrapped component from torch to an ONNX file with free batch, height and width."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from onnxscript import ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from torch.export import Dim, ExportedProgram

from hypergen_export.checkpoints.components import Component, Sizes
from hypergen_export.conversion.examples import as_kwargs, example_inputs
from hypergen_export.conversion.linking import WeightFiles, link_weights
from hypergen_export.conversion.sources import LARGEST_LOADED, Placeholders
from hypergen_export.errors import ConversionError, first_line

# The opset that torch's exporter is written for, so no conversion follows. Measured with OpenVINO on a UNet
# of 16 M parameters, 8×8 latents, batch 2 and 16, bfloat16: opset 18 took 11 and 45 ms, opset 21 (GroupNormalization
# as one operator) and 23 (Attention as one too) took 14 and 63 ms.
OPSET = 18
_RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.reshape_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.max_min_rule,
    rules.fuse_pad_into_conv_rule,
)
# No batch of 1 and no multiples of the levels' factors: torch would specialise the graph to such values.
_EXAMPLE = {"batch": 3, "height": 14, "width": 10, "text_tokens": 40, "reference_tokens": 35}


def capture(component: Component, wrapped: torch.nn.Module, sizes: Sizes) -> ExportedProgram:
    """Trace the component's graph with its free axes. Raises ConversionError."""
    inputs = as_kwargs(component, example_inputs(component, sizes, **_EXAMPLE))
    free = {tensor.name: dict.fromkeys(tensor.free_axes(), Dim.DYNAMIC) for tensor in component.inputs}
    try:
        with torch.no_grad():
            return torch.export.export(wrapped, (), inputs, dynamic_shapes=free, strict=False)
    except Exception as error:  # torch.export documents no errors
        raise ConversionError(f"{component.name}: torch.export failed ({first_line(error)})") from error


@dataclass(frozen=True)
class Weights:
    """The placeholders of a program, the files that its weights go to, and the type of those that are written."""

    placeholders: Placeholders
    files: WeightFiles
    dtype: torch.dtype


def write_onnx(component: Component, program: ExportedProgram, path: Path, weights: Weights | None = None) -> None:
    """Write the graph to `path`, and let it refer to files for the values of placeholders.

    Everything else is inside the file, which holds at most 2 GB. Raises ConversionError, OSError.
    """
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
        assert converted is not None  # only the exporter without dynamo returns None
        if weights:
            link_weights(converted.model, weights.placeholders, weights.files, weights.dtype)
        optimize(converted.model)
        resize_in_float32(converted.model)
        ir.save(converted.model, path)
    except ConversionError as error:
        raise ConversionError(f"{component.name}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConversionError(f"{component.name}: torch.onnx failed ({first_line(error)})") from error


def optimize(model: ir.Model) -> None:
    """Fold constants, rewrite and remove nodes, as `onnxscript.optimizer.optimize_ir` does in one iteration.

    torch would run two: the second takes as long and removes 50 of a UNet's 1,300 nodes. Of onnxscript's rules only
    those that match a family's graph are applied. Among the others is `slice_split_rule`, which reads the whole graph
    for each node: it took two thirds of the conversion of a text encoder with 27 layers.
    """
    passes.InlinePass()(model)
    onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_should_fold)
    ir.passes.Sequential(
        RewritePass(_RULES),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Not for weights outside the file, which would be copied into it: by default their transpositions are folded.

    Engines fold them when they load the file. None leaves the decision to the optimizer.
    """
    tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    is_outside = any(isinstance(tensor, ir.ExternalTensor) or tensor.size > LARGEST_LOADED for tensor in tensors)
    return False if is_outside else None


def resize_in_float32(model: ir.Model) -> None:
    """Compute every bfloat16 Resize in float32: TensorRT has none in bfloat16. Nearest-neighbour values are equal."""
    resizes = [node for node in model.graph if node.op_type == "Resize"]
    for node in resizes:
        if node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        widened = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
        narrowed = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.BFLOAT16})
        node.outputs[0].replace_all_uses_with(narrowed.outputs[0])
        narrowed.replace_input_with(0, node.outputs[0])  # undoes the replacement of this use
        node.replace_input_with(0, widened.outputs[0])
        node.outputs[0].dtype, narrowed.outputs[0].dtype = ir.DataType.FLOAT, ir.DataType.BFLOAT16
        model.graph.insert_before(node, widened)
        model.graph.insert_after(node, narrowed)
