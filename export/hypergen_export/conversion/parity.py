"""Whether an exported component computes what torch computes, in the engine that will serve it.

It compares at shapes the graph was not traced with, since a dimension frozen by the trace shows only there.
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
from hypergen_export.conversion.examples import by_name, example_inputs
from hypergen_export.errors import ConversionError, ParityMissedError, first_line

Array = npt.NDArray[np.generic]
Engine = Callable[[list[Array]], list[Array]]

# What a graph that is not in float32 loses, against a torch that computes with the same weights: as a root mean square,
# since of so many roundings the largest is a matter of luck. A wrong operator, axis or weight costs more by far.
_ROUNDING = {"float16": 0.01, "bfloat16": 0.05}
_LEVELS = 255  # of a picture

# Neither the batch nor the sides of the example, even and odd, wide and high.
_SHAPES = ({"batch": 1, "height": 8, "width": 12}, {"batch": 4, "height": 11, "width": 9})


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The difference found, and what was allowed: the largest one in float32, else a root mean square."""

    difference: float
    tolerance: float


def compare(component: Component, wrapped: torch.nn.Module, sizes: Sizes, path: Path, dtype: str = "float32") -> Parity:
    """Hold the file at `path`, whose weights are of `dtype`, against `wrapped`, which is in float32.

    Raises ParityMissedError, ConversionError.
    """
    measure = _largest if dtype == "float32" else _root_mean_square
    allowed = _allowed(component, dtype)
    engine = _openvino_float32(component, path)
    pairs = (
        pair for s in _SHAPES for pair in _outputs(component, wrapped, engine, example_inputs(component, sizes, **s))
    )
    # Not the built-in one, which loses a NaN.
    difference = float(np.max([measure(*pair) for pair in pairs]))
    if not math.isfinite(difference):
        raise ParityMissedError(f"{component.name}: torch or the exported model computes values that are not finite")
    if difference > allowed:
        raise ParityMissedError(
            f"{component.name}: the exported model differs from torch by {difference:.2g}, "
            f"more than the {allowed:g} allowed"
        )
    return Parity(difference=difference, tolerance=allowed)


def _allowed(component: Component, dtype: str) -> float:
    if dtype == "float32":
        return component.tolerance
    is_picture = any(tensor.dtype == BYTE for tensor in component.outputs)
    return _ROUNDING[dtype] * (_LEVELS if is_picture else 1)


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


def _outputs(
    component: Component, wrapped: torch.nn.Module, engine: Engine, inputs: tuple[torch.Tensor, ...]
) -> Iterator[tuple[Array, Array]]:
    """Each output by torch and by the engine."""
    with torch.no_grad():
        expected = wrapped(**by_name(component, inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    given = engine([tensor.numpy() for tensor in inputs])
    for theirs, ours in zip((tensor.numpy() for tensor in expected), given, strict=True):
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise ParityMissedError(
                f"{component.name}: torch gives {theirs.dtype}{list(theirs.shape)}, "
                f"the exported model {ours.dtype}{list(ours.shape)}"
            )
        yield theirs, ours


def _largest(theirs: Array, ours: Array) -> float:
    """Of bytes in levels; of floats relative to the largest magnitude where that exceeds one."""
    reference = theirs.astype(np.float64)
    scale = 1.0 if theirs.dtype == np.uint8 else max(1.0, float(np.abs(reference).max()))
    return float(np.abs(reference - ours.astype(np.float64)).max() / scale)


def _root_mean_square(theirs: Array, ours: Array) -> float:
    """Of bytes in levels; of floats relative to the root mean square of what is expected."""
    reference = theirs.astype(np.float64)
    scale = 1.0 if theirs.dtype == np.uint8 else float(np.sqrt(np.square(reference).mean()))
    return float(np.sqrt(np.square(reference - ours.astype(np.float64)).mean()) / scale)
