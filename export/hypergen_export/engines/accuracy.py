"""How far the outputs of a quantised component may be from those in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hypergen_export.checkpoints.components import FP8, INT4_WEIGHTS, INT8, INT8_WEIGHTS, Component
from hypergen_export.conversion.parity import Parity
from hypergen_export.errors import ParityMissedError

# Largest root mean square error of the outputs, relative to that of the outputs in float32. Too small to be caused by a
# layer that lost its range, and above what rounding costs the models that were measured.
TOLERANCES = {INT8: 0.15, FP8: 0.15, INT8_WEIGHTS: 0.05, INT4_WEIGHTS: 0.3}

Array = npt.NDArray[Any]


def relative_error(expected: Sequence[Sequence[Array]], given: Sequence[Sequence[Array]]) -> float:
    """The largest of the outputs: the root mean square of the error over all calls, relative to the output's own."""
    errors = map(_relative_rms, zip(*expected, strict=True), zip(*given, strict=True))
    return float(np.max(list(errors)))  # the built-in max does not propagate NaN


def check_error(component: Component, dtype: str, difference: float) -> Parity:
    """The error as what is recorded of a component. Raises ParityMissedError."""
    if not difference <= TOLERANCES[dtype]:  # NaN is no smaller
        raise ParityMissedError(
            f"{component.name}: in {dtype} it differs from float32 by {difference:.2g} of its outputs' root mean "
            f"square, the limit is {TOLERANCES[dtype]:g}; use a precision of more bits"
        )
    return Parity(difference=difference, tolerance=TOLERANCES[dtype])


def _relative_rms(expected: Sequence[Array], given: Sequence[Array]) -> float:
    error = sum(float(np.square(ours - theirs).sum()) for theirs, ours in zip(expected, given, strict=True))
    whole = sum(float(np.square(theirs).sum()) for theirs in expected)
    # Outputs of a layer without weights yet are zero.
    return math.sqrt(error / whole) if whole else math.sqrt(error)
