"""A Python-based Triton backend `openvino`: runs `model.onnx` of a model's version folder on the CPU.

Stands in for the native OpenVINO backend of NVIDIA's container, which the PyPI wheel lacks, and reads the same layout
and parameters, so that one repository runs on both: PERFORMANCE_HINT, NUM_STREAMS, INFERENCE_NUM_THREADS, HINT_BF16.
Knows nothing of diffusion. Runs inside Triton's Python stub.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import triton_python_backend_utils as pb_utils

PASSED_ON = ("PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS")
# Compiled for its very shapes, a model takes up to a third less time, as kernels are chosen and fused for them. That
# costs half a second and twice the weights in memory per shape, so larger models than this are compiled once for all.
SMALL_BYTES = 64 * 2**20
MAX_EXACT_ROWS = 16
# Shapes of other sizes than the usual one that are compiled as well; one that nobody has used for so long makes room.
MAX_OTHERS = 12
UNUSED_SECONDS = 60.0
Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


class TritonPythonModel:
    """One compiled model; `execute` merges the requests of a dynamic batch into one inference."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """The exporter writes complete configurations: nothing to add."""
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Compile the model. An error here keeps the model from becoming ready."""
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"], args["model_version"], config["default_model_filename"] or "model.onnx")
        self._compiled = _Compiled(file, _properties(config["parameters"]))
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run all requests as one batch; Triton has made sure that all shapes but the batch's agree."""
        parts = [[_input(request, name) for request in requests] for name in self._inputs]
        sizes = [len(part) for part in parts[0]]
        try:
            outputs = self._infer(dict(zip(self._inputs, parts, strict=True)))
        except Exception as error:
            failure = pb_utils.TritonError(f"OpenVINO: {error}")
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        return _split(outputs, sizes)

    def _infer(self, parts: dict[str, list[Array]]) -> dict[str, Array]:
        batch = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
        # share_inputs only: the outputs' memory is used again by the next inference.
        results = self._compiled.request_for(batch).infer(batch, share_inputs=True)
        return {name: results[name] for name in self._outputs}


class _Compiled:
    """A model's compilations: one for any shape and, of a small model, one for each shape that it is called with.

    The usual size is the first that the model meets; the exporter's warm-up makes it the checkpoint's default. All its
    batches have room, so that nobody who asks for odd sizes makes it slow for the others.
    """

    def __init__(self, file: Path, properties: dict[str, Any]) -> None:
        self._core = openvino.Core()
        self._file = file
        self._properties = properties
        self._usual: Shapes | None = None
        self._exact: dict[Shapes, Any] = {}
        self._others: OrderedDict[Shapes, float] = OrderedDict()  # when each was used last
        self._is_small = sum(each.stat().st_size for each in file.parent.iterdir()) <= SMALL_BYTES
        self._any = None if self._is_small else self._compile({})

    def request_for(self, batch: dict[str, Array]) -> Any:
        """The infer request for arrays of these shapes."""
        shapes = tuple(array.shape for array in batch.values())
        if not self._is_small or not self._has_room(shapes):
            if self._any is None:
                self._any = self._compile({})
            return self._any
        if shapes not in self._exact:
            self._exact[shapes] = self._compile(dict(zip(batch, shapes, strict=True)))
        return self._exact[shapes]

    def _has_room(self, shapes: Shapes) -> bool:
        size = tuple(shape[1:] for shape in shapes)
        if self._usual is None:
            self._usual = size
        if shapes[0][0] > MAX_EXACT_ROWS or size == self._usual:
            return shapes[0][0] <= MAX_EXACT_ROWS
        now = time.monotonic()
        if shapes not in self._others and len(self._others) == MAX_OTHERS:
            oldest, used = next(iter(self._others.items()))
            if now - used < UNUSED_SECONDS:
                return False
            del self._others[oldest], self._exact[oldest]
        self._others[shapes] = now
        self._others.move_to_end(shapes)
        return True

    def _compile(self, shapes: dict[str, Shape]) -> Any:
        model = self._core.read_model(self._file)
        if shapes:
            model.reshape(shapes)
        return self._core.compile_model(model, "CPU", self._properties).create_infer_request()


def _properties(parameters: dict[str, dict[str, str]]) -> dict[str, Any]:
    given = {key: entry["string_value"] for key, entry in parameters.items()}
    properties: dict[str, Any] = {key: given[key] for key in PASSED_ON if key in given}
    # Said in either case: where a CPU has bf16, OpenVINO would take it unasked.
    properties["INFERENCE_PRECISION_HINT"] = "bf16" if given.get("HINT_BF16") == "YES" else "f32"
    return properties


def _input(request: Any, name: str) -> Array:
    array: Array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return array


def _split(outputs: dict[str, Array], sizes: list[int]) -> list[Any]:
    responses = []
    first = 0
    for size in sizes:
        tensors = [pb_utils.Tensor(name, array[first : first + size]) for name, array in outputs.items()]
        responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        first += size
    return responses
