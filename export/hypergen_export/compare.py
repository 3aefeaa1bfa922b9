"""Whether an exported component computes what torch computes, in the engine that will serve it.

It compares at shapes the graph was not traced with, since a dimension frozen by the trace shows only there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
import torch

from hypergen_export.components import BYTE, Component, Sizes
from hypergen_export.errors import ConversionError, ParityMissedError, first_line
from hypergen_export.examples import by_name, example_inputs

Array = npt.NDArray[np.generic]
Engine = Callable[[list[Array]], list[Array]]

# What the graph's own constants lose where it is not in float32, against a torch that computes with the same weights.
# A wrong operator, axis or weight costs more by far.
_ROUNDING = {"float32": 0.0, "float16": 0.01, "bfloat16": 0.05}
_LEVELS = 255  # of a picture

# Neither the batch nor the sides of the example, even and odd, wide and high.
_SHAPES = ({"batch": 1, "height": 8, "width": 12}, {"batch": 4, "height": 11, "width": 9})


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The largest difference found, and what was allowed."""

    difference: float
    tolerance: float


def compare(component: Component, wrapped: torch.nn.Module, sizes: Sizes, path: Path, dtype: str = "float32") -> Parity:
    """Hold the file at `path`, whose weights are of `dtype`, against `wrapped`, which is in float32.

    Raises ParityMissedError, ConversionError.
    """
    allowed = _allowed(component, dtype)
    engine = _openvino_float32(component, path)
    difference = max(_difference(component, wrapped, engine, example_inputs(component, sizes, **s)) for s in _SHAPES)
    # Written so that NaN, which compares false with everything, is a miss.
    if not difference <= allowed:
        raise ParityMissedError(
            f"{component.name}: the exported model differs from torch by {difference:.2g}, "
            f"more than the {allowed:g} allowed"
        )
    return Parity(difference=difference, tolerance=allowed)


def _allowed(component: Component, dtype: str) -> float:
    is_picture = any(tensor.dtype == BYTE for tensor in component.outputs)
    return max(component.tolerance, _ROUNDING[dtype] * (_LEVELS if is_picture else 1))


def _openvino_float32(component: Component, path: Path) -> Engine:
    """The file in OpenVINO with float32 arithmetic: what bfloat16 rounds away is no fault of the export."""
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ConversionError(f"{component.name}: OpenVINO refuses the export ({first_line(error)})") from error

    def run(inputs: list[Array]) -> list[Array]:
        results = compiled(inputs)
        return [np.asarray(results[tensor.name]) for tensor in component.outputs]

    return run


def _difference(
    component: Component, wrapped: torch.nn.Module, engine: Engine, inputs: tuple[torch.Tensor, ...]
) -> float:
    """Largest difference over all outputs, for floats relative to the largest magnitude where that exceeds one."""
    with torch.no_grad():
        expected = wrapped(**by_name(component, inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    given = engine([tensor.numpy() for tensor in inputs])
    pairs = zip((tensor.numpy() for tensor in expected), given, strict=True)
    return max(_distance(component, theirs, ours) for theirs, ours in pairs)


def _distance(component: Component, theirs: Array, ours: Array) -> float:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise ParityMissedError(
            f"{component.name}: torch gives {theirs.dtype}{list(theirs.shape)}, "
            f"the exported model {ours.dtype}{list(ours.shape)}"
        )
    difference = np.abs(theirs.astype(np.float64) - ours.astype(np.float64)).max()
    scale = 1.0 if theirs.dtype == np.uint8 else max(1.0, float(np.abs(theirs.astype(np.float64)).max()))
    return float(difference / scale)
