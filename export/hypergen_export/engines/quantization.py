"""A component's ONNX file becomes OpenVINO's IR with weights, and in int8 also activations, of eight or four bits.

NNCF quantises. A graph of int8 has its scales from calls that were recorded while the model generated images, and is
measured with the calls of other images; weights alone need no calls. Importing this module imports openvino and torch,
but NNCF is imported only to quantise something.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino

# What openvino.convert_model does to a graph that read_model has read, without its telemetry.
from openvino._offline_transformations import apply_moc_transformations

from hypergen_export.checkpoints.components import INT8, INT8_WEIGHTS, Component
from hypergen_export.conversion.linking import checkpoint_name
from hypergen_export.conversion.parity import Parity
from hypergen_export.engines.accuracy import Array, check_error, relative_error
from hypergen_export.engines.engine import is_in_bfloat16
from hypergen_export.engines.tensorrt import onnx_files
from hypergen_export.errors import ConversionError, MissingDependencyError, first_line

# Weights of one output channel that share a scale of four bits, where their number allows it.
_GROUP_SIZE, _SMALLEST_GROUP = 64, 16
# NNCF reads all calls for the scales of SmoothQuant, for the ranges of activations and for the correction of biases.
_PASSES = 3
# How far SmoothQuant moves outliers of a linear layer's input into its weights. With NNCF's default of 0.95 the shipped
# UNet's error is 0.048, with this one 0.040. Convolutions are not smoothed.
_SMOOTHING = 0.5
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")

Call = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Inputs of a component: those that its ranges are taken from, and those that the error is measured with."""

    calibration: Sequence[Call]
    held_out: Sequence[Call]


def require_nncf(dtype: str) -> None:
    """Raise MissingDependencyError if NNCF is not installed."""
    # Else it reports its use to its vendor.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        importlib.import_module("nncf")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; --dtype {dtype} needs: pip install 'hypergen-triton[int8]'"
        ) from error


def quantize(component: Component, dtype: str, onnx: Path, calls: Calls, report: Callable[[float], None]) -> Parity:
    """Replace a component's ONNX file with `model.xml` and `model.bin`; returns the error of its outputs.

    `report` is called with the share that is done. Raises ConversionError, ParityMissedError.
    """
    expected = _outputs(component, onnx, "f32", calls.held_out)
    quantized = onnx.with_suffix(".xml")
    try:
        with _quiet():
            openvino.save_model(_quantized(component, dtype, onnx, calls, report), quantized, compress_to_fp16=False)
    except Exception as error:  # NNCF documents no errors
        raise ConversionError(f"{component.name}: NNCF failed ({first_line(error)})") from error
    for file in onnx_files(onnx):
        file.unlink()
    precision = "bf16" if is_in_bfloat16(component, dtype) else "f32"
    difference = relative_error(expected, _outputs(component, quantized, precision, calls.held_out))
    return check_error(component, dtype, difference)


def compiled(file: Path, precision: str) -> Any:
    """The model of a file, compiled with OpenVINO's name of a precision for what is not quantised."""
    core = openvino.Core()
    return core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": precision})


def _quantized(component: Component, dtype: str, onnx: Path, calls: Calls, report: Callable[[float], None]) -> Any:
    """The graph of an ONNX file, quantised by NNCF."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    model, names = _read(component, dtype, onnx)
    scope = nncf.IgnoredScope(names=names, validate=False)
    if dtype == INT8:
        return nncf.quantize(
            model,
            nncf.Dataset(calls.calibration, _counted(_PASSES * len(calls.calibration), report)),
            # Ranges of activations after a SiLU are one-sided and get a zero point; those of weights have none.
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calls.calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=scope,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # Weights of seven bits: without VNNI, a CPU adds pairs of products of eight bits in sixteen, which
                # overflow. On one with AVX2 alone, the shipped UNet's error was 0.106 with eight bits and is 0.067.
                # With VNNI eight would be a little better (by 1.7 dB in its passport), but an export may move.
                overflow_fix=nncf.OverflowFix.ENABLE,
                # The extremes of all calls. What layers read changes with the noise: NNCF's default, the mean of the
                # calls' extremes, cuts off the rest, on a miniature more than half of a layer's range.
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=_SMOOTHING, convolution=-1),
            ),
        )
    if dtype == INT8_WEIGHTS:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=scope)
    # Embeddings, convolutions and the last layer keep eight bits.
    groups = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_SMALLEST_GROUP
    )
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        ratio=1.0,
        group_size=_GROUP_SIZE,
        ignored_scope=scope,
        advanced_parameters=groups,
    )


def _read(component: Component, dtype: str, onnx: Path) -> tuple[Any, list[str]]:
    """The graph, and the names of its layers that are not to be quantised."""
    model = openvino.Core().read_model(onnx)
    # Before transpositions are folded, which renames the weights.
    layers = (node for node in model.get_ordered_ops() if node.get_type_name() in _LAYERS)
    names = [node.get_friendly_name() for node in layers if component.keeps(_weights(node), dtype)]
    apply_moc_transformations(model, False, False)
    return model, names


def _weights(layer: Any) -> str:
    """The name of a layer's weights, as in the checkpoint; empty if they are computed."""
    node = layer.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Transpose", "Reshape"):
        node = node.input_value(0).get_node()
    name: str = node.get_friendly_name() if node.get_type_name() == "Constant" else ""
    return checkpoint_name(name)


def _counted(expected: int, report: Callable[[float], None]) -> Callable[[Call], Call]:
    """A function that returns each call as it is, and reports the share of them that was read."""
    read = itertools.count(1)

    def count(call: Call) -> Call:
        report(min(1.0, next(read) / expected))
        return call

    return count


def _outputs(component: Component, file: Path, precision: str, calls: Sequence[Call]) -> list[list[Array]]:
    engine = compiled(file, precision)
    results = (engine(call) for call in calls)
    return [[np.array(result[tensor.name]) for tensor in component.outputs] for result in results]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's log and progress bars, which go to stdout.

    `nncf.set_log_level` would also change the handlers that others have added to NNCF's logger, as pytest does.
    """
    from nncf.common.logging import nncf_logger

    nncf_logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
