"""A model's compilations in OpenVINO: one for any shape and, of a small model, one for each of a few shapes.

Knows shapes and memory, nothing of Triton. The backend's `model.py` imports it as a part of the installed package.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from hypergen_gateway.embedded.backends.openvino.flattening import flatten_channel_scales

# Compiled for its very shapes, a model takes up to a fifth less time. That costs half a second and three times the
# weights in memory per shape, so larger models than this are compiled once for all.
SMALL_BYTES = 64 * 2**20
# One picture without guidance and with it, and full batches: between them little is to be gained, and a compilation for
# each count of rows would take a gigabyte.
EXACT_ROWS = frozenset({1, 2, 4, 8, 16})
# Kernels that the compilation for any shape keeps. With OpenVINO's own 5000 their memory grows for as long as new sizes
# come, past a gigabyte; with fewer, sizes that come by turns are slower.
KEPT_KERNELS = 2000
logger = logging.getLogger(__name__)
Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]


class Compilations:
    """A model's compilations: one for any shape and, of a small model, one for each of its exact shapes.

    Only the first call, which is the exporter's warm-up, waits for an exact compilation. Later ones are made in the
    background when they are first of use, and the general one serves until then: it takes a fifth more time for a
    step, while a compilation takes as long as thirty steps. None is ever dropped or made again.
    """

    def __init__(self, file: Path, properties: Mapping[str, Any]) -> None:
        self._core = openvino.Core()
        self._properties = {**properties, "CPU_RUNTIME_CACHE_CAPACITY": str(KEPT_KERNELS)}
        # Read once: what is compiled of its copies shares its weights, as far as they are not packed for kernels.
        self._model = read_model(self._core, file)
        self._any = Compilation(self._compile(self._model))
        self._choice = ExactShapes()
        self._exact: dict[int, Future[Compilation]] = {}
        self._is_small = is_small(file)
        self._compiler = ThreadPoolExecutor(1, "compiler")

    def find(self, batch: Mapping[str, Array]) -> Compilation:
        """The fastest one that exists for arrays of these shapes, rows first."""
        shapes = {name: array.shape for name, array in batch.items()}
        if not (self._is_small and self._choice.includes(shapes)):
            return self._any
        rows = _rows(shapes)
        if rows not in self._exact:
            self._exact[rows] = self._compiler.submit(self._compile_exact, shapes)
            if len(self._exact) == 1:
                return self._exact[rows].result()
        return self._exact[rows].result() if self._exact[rows].done() else self._any

    def close(self) -> None:
        """Stop compiling in the background."""
        self._compiler.shutdown(cancel_futures=True)

    def _compile_exact(self, shapes: Shapes) -> Compilation:
        """The one for these shapes; the general one if there can be none, as for want of memory."""
        try:
            model = self._model.clone()
            model.reshape(dict(shapes))
            return ExactCompilation(self._compile(model), shapes)
        except RuntimeError:
            logger.exception("Not compiled for %s; the compilation for any shape serves them, too", shapes)
            return self._any

    def _compile(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._properties).create_infer_request()


class Compilation:
    """What runs arrays of any shape; the outputs' memory is used again by the next inference."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def infer(self, batch: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The outputs of these names."""
        results = self._request.infer(batch, share_inputs=True)
        return {name: results[name] for name in outputs}


class ExactCompilation(Compilation):
    """One for a single shape. Arrays are copied into its own tensors: to hand them over takes twice as long."""

    def __init__(self, request: Any, inputs: Iterable[str]) -> None:
        super().__init__(request)
        self._inputs = {name: request.get_tensor(name).data for name in inputs}

    def infer(self, batch: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        for name, array in batch.items():
            np.copyto(self._inputs[name], array)
        self._request.infer()
        return {name: self._request.get_tensor(name).data for name in outputs}


class ExactShapes:
    """Which shapes are worth a compilation of their own: `EXACT_ROWS` of the usual size.

    The usual size is the first that the model meets; the exporter's warm-up makes it the checkpoint's default.
    """

    def __init__(self) -> None:
        self._usual: Shapes | None = None

    def includes(self, shapes: Shapes) -> bool:
        """Whether these are; the first ones make their size the usual one."""
        size = {name: shape[1:] for name, shape in shapes.items()}
        self._usual = self._usual or size
        return size == self._usual and _rows(shapes) in EXACT_ROWS


def read_model(core: openvino.Core, file: Path) -> Any:
    """The model, of a small one as OpenVINO runs it faster; others draw larger pictures, whose rows are long enough."""
    model = core.read_model(file)
    if is_small(file):
        flatten_channel_scales(model)
    return model


def is_small(file: Path) -> bool:
    """Whether the model, with its weights beside it, is worth compilations for single shapes."""
    return sum(each.stat().st_size for each in file.parent.iterdir()) <= SMALL_BYTES


def _rows(shapes: Shapes) -> int:
    return next(iter(shapes.values()))[0]
