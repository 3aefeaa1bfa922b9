"""A model's compilations in OpenVINO: one for any shape and, if the model is small, one for each of a few shapes.

Does not depend on Triton. The backend's `model.py` imports it from the installed package.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from hypergen_gateway.embedded.backends.openvino.flattening import flatten_channel_scales

# A model compiled for exact shapes takes up to a fifth less time. Each compilation costs half a second and three times
# the weights in memory, so models larger than this have only the one for any shape.
SMALL_BYTES = 64 * 2**20
# One image without and with guidance, and full batches. There is little to gain in between, and a compilation for each
# number of rows would take a gigabyte.
EXACT_ROWS = frozenset({1, 2, 4, 8, 16})
# Kernels that the compilation for any shape caches. With OpenVINO's default of 5000, memory grows with every new size,
# to more than a gigabyte; with fewer kernels, alternating sizes are slower.
KEPT_KERNELS = 2000
logger = logging.getLogger(__name__)
Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Compiled:
    """A model with its weights, compiled for any shape and, by rows, for exact shapes."""

    model: Any
    any: Compilation
    exact: dict[int, Future[Compilation]] = field(default_factory=dict)


class Compilations:
    """A model's compilations: one for any shape and, if the model is small, one for each of its exact shapes.

    Only the first call, which is the exporter's warm-up, waits for an exact compilation. Later ones are compiled in the
    background when first needed, and the general one is used until then: it makes a step a fifth slower, while a
    compilation takes as long as thirty steps. Compilations are never dropped or repeated.
    """

    def __init__(self, file: Path, properties: Mapping[str, Any]) -> None:
        self._core = openvino.Core()
        self._properties = {**properties, "CPU_RUNTIME_CACHE_CAPACITY": str(KEPT_KERNELS)}
        self._file = file
        self._compiled = self._read()
        self._choice = ExactShapes()
        self._is_small = is_small(file)
        self._compiler = ThreadPoolExecutor(1, "compiler")

    def find(self, batch: Mapping[str, Array]) -> Compilation:
        """The fastest available compilation for arrays of these shapes, whose first axis is the rows."""
        shapes = {name: array.shape for name, array in batch.items()}
        compiled, is_first = self._compiled, not self._choice.is_chosen
        if not (self._is_small and self._choice.includes(shapes)):
            return compiled.any
        rows = _rows(shapes)
        if rows not in compiled.exact:
            compiled.exact[rows] = self._compiler.submit(self._compile_exact, compiled, shapes)
        exact = compiled.exact[rows]
        return exact.result() if is_first or exact.done() else compiled.any

    def read_again(self) -> None:
        """Compile the model with the weights that its files hold now; until that is done, calls use the earlier ones.

        Exact compilations follow when they are needed. Raises RuntimeError.
        """
        self._compiled = self._read()

    def close(self) -> None:
        """Stop compiling in the background."""
        self._compiler.shutdown(cancel_futures=True)

    def _read(self) -> _Compiled:
        # Read once, as compilations of its clones share its weights, except those repacked for kernels.
        model = read_model(self._core, self._file)
        return _Compiled(model, Compilation(self._compile(model)))

    def _compile_exact(self, compiled: _Compiled, shapes: Shapes) -> Compilation:
        """Compile for these shapes; returns the general compilation if that fails, for example for lack of memory."""
        try:
            model = compiled.model.clone()
            model.reshape(dict(shapes))
            return ExactCompilation(self._compile(model), shapes)
        except RuntimeError:
            logger.exception("Not compiled for %s; the compilation for any shape serves them, too", shapes)
            return compiled.any

    def _compile(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._properties).create_infer_request()


class Compilation:
    """A compilation for any shape. The next inference reuses the memory of the outputs."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def infer(self, batch: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run an inference and return the named outputs."""
        results = self._request.infer(batch, share_inputs=True)
        return {name: results[name] for name in outputs}


class ExactCompilation(Compilation):
    """A compilation for one shape. Arrays are copied into its own tensors, as passing them takes twice as long."""

    def __init__(self, request: Any, inputs: Iterable[str]) -> None:
        super().__init__(request)
        self._inputs = {name: request.get_tensor(name).data for name in inputs}

    def infer(self, batch: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        for name, array in batch.items():
            np.copyto(self._inputs[name], array)
        self._request.infer()
        return {name: self._request.get_tensor(name).data for name in outputs}


class ExactShapes:
    """Decides which shapes get a compilation of their own: `EXACT_ROWS` of the usual size.

    The usual size is that of the first call; due to the exporter's warm-up it is the checkpoint's default.
    """

    def __init__(self) -> None:
        self._usual: Shapes | None = None

    @property
    def is_chosen(self) -> bool:
        """Whether the usual size is known."""
        return self._usual is not None

    def includes(self, shapes: Shapes) -> bool:
        """Whether `shapes` get one. The first call sets the usual size."""
        size = {name: shape[1:] for name, shape in shapes.items()}
        self._usual = self._usual or size
        return size == self._usual and _rows(shapes) in EXACT_ROWS


def read_model(core: openvino.Core, file: Path) -> Any:
    """Read the model. Only small ones are flattened, as the images of larger models have long enough rows."""
    model = core.read_model(file)
    if is_small(file):
        flatten_channel_scales(model)
    return model


def is_small(file: Path) -> bool:
    """Whether the model, with its external weights, is small enough for compilations for single shapes."""
    return sum(each.stat().st_size for each in file.parent.iterdir()) <= SMALL_BYTES


def _rows(shapes: Shapes) -> int:
    return next(iter(shapes.values()))[0]
