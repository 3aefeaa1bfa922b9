"""Compare an exported component, run by OpenVINO, with torch.

The shapes differ from those of the trace, since a dimension frozen by the trace shows only at other shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
import torch

from hypergen_export.checkpoints.components import BYTE, Component, Sizes
from hypergen_export.conversion.examples import as_kwargs, example_inputs
from hypergen_export.errors import ConversionError, ParityMissedError, first_line

Array = npt.NDArray[np.generic]
Engine = Callable[[list[Array]], list[Array]]
# Per example, the outputs in the component's order.
Outputs = list[list[Array]]

# Allowed difference of a half-precision graph from torch in float32 with the same weights. A root mean square, since
# the largest of so many rounding errors is random. A wrong operator, axis or weight makes a far larger one.
_ROUNDING = {"float16": 0.01, "bfloat16": 0.05}
_LEVELS = 255  # of an image

# Batches and sizes that differ from the trace's: even and odd, wide and tall, without and with reference images.
SHAPES = (
    {"batch": 1, "height": 8, "width": 12, "text_tokens": 24},
    {"batch": 4, "height": 11, "width": 9, "text_tokens": 70, "reference_tokens": 63},
)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The difference and its limit: the largest difference in float32, else the root mean square."""

    difference: float
    tolerance: float


def compare(component: Component, wrapped: torch.nn.Module, sizes: Sizes, path: Path, dtype: str = "float32") -> Parity:
    """Compare the ONNX file at `path`, with weights of `dtype`, with `wrapped`, which is in float32.

    Raises ParityMissedError, ConversionError.
    """
    return compare_outputs(component, torch_outputs(component, wrapped, sizes), sizes, path, dtype)


def torch_outputs(component: Component, wrapped: torch.nn.Module, sizes: Sizes) -> Outputs:
    """What torch gives for the examples of `compare_outputs`; afterwards the module's memory can be freed."""
    with torch.no_grad():
        results = [wrapped(**as_kwargs(component, example_inputs(component, sizes, **shape))) for shape in SHAPES]
    return [[tensor.numpy() for tensor in (result if isinstance(result, tuple) else (result,))] for result in results]


def compare_outputs(
    component: Component, expected: Outputs, sizes: Sizes, path: Path, dtype: str = "float32"
) -> Parity:
    """Compare the ONNX file at `path`, with weights of `dtype`, with what `torch_outputs` returned in float32.

    Raises ParityMissedError, ConversionError.
    """
    measure = _largest if dtype == "float32" else _root_mean_square
    allowed = _allowed(component, dtype)
    engine = _openvino_float32(component, path)
    pairs = [
        pair
        for shape, theirs in zip(SHAPES, expected, strict=True)
        for pair in _pairs(component, theirs, engine([x.numpy() for x in example_inputs(component, sizes, **shape)]))
    ]
    # np.max propagates NaN; the built-in max does not.
    difference = float(np.max([measure(*pair) for pair in pairs]))
    if not math.isfinite(difference):
        raise ParityMissedError(f"{component.name}: torch or the exported model gives non-finite values")
    if difference > allowed:
        raise ParityMissedError(
            f"{component.name}: the exported model differs from torch by {difference:.2g}, the limit is {allowed:g}"
        )
    return Parity(difference=difference, tolerance=allowed)


def _allowed(component: Component, dtype: str) -> float:
    if dtype == "float32":
        return component.tolerance
    is_image = any(tensor.dtype == BYTE for tensor in component.outputs)
    return _ROUNDING[dtype] * (_LEVELS if is_image else 1)


def _openvino_float32(component: Component, path: Path) -> Engine:
    """The ONNX file in OpenVINO, computed in float32: rounding to bfloat16 is not an error of the export."""
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ConversionError(f"{component.name}: OpenVINO rejects the ONNX file ({first_line(error)})") from error

    def run(inputs: list[Array]) -> list[Array]:
        results = compiled(inputs)
        return [np.asarray(results[tensor.name]) for tensor in component.outputs]

    return run


def _pairs(component: Component, expected: list[Array], given: list[Array]) -> Iterator[tuple[Array, Array]]:
    """Each output as computed by torch and by the engine."""
    for theirs, ours in zip(expected, given, strict=True):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise ParityMissedError(
                f"{component.name}: torch gives {theirs.dtype}{list(theirs.shape)}, "
                f"the exported model {ours.dtype}{list(ours.shape)}"
            )
        yield theirs, ours


def _largest(theirs: Array, ours: Array) -> float:
    """The largest difference: of bytes in levels, of floats relative to the largest magnitude if that exceeds one."""
    reference = theirs.astype(np.float64)
    scale = 1.0 if theirs.dtype == np.uint8 else max(1.0, float(np.abs(reference).max()))
    return float(np.abs(reference - ours.astype(np.float64)).max() / scale)


def _root_mean_square(theirs: Array, ours: Array) -> float:
    """The root mean square: of bytes in levels, of floats relative to that of the expected values if these are any."""
    reference = theirs.astype(np.float64)
    scale = 1.0 if theirs.dtype == np.uint8 else float(np.sqrt(np.square(reference).mean())) or 1.0
    return float(np.sqrt(np.square(reference - ours.astype(np.float64)).mean()) / scale)
