"""The Python-based Triton backend `openvino`, which runs the `model.onnx` of a model's version folder on the CPU.

Replaces the native OpenVINO backend of NVIDIA's container, which the PyPI wheel lacks. Both read the same layout and
parameters, so one repository runs on either: PERFORMANCE_HINT, NUM_STREAMS, INFERENCE_NUM_THREADS, HINT_BF16.
FOLLOWED_WEIGHTS is ours: a file beside the model that may be replaced while it is served. Not specific to diffusion.
Runs inside Triton's Python stub, in the environment that the gateway is installed in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from hypergen_gateway.embedded.backends.openvino.compilations import Compilations
from hypergen_gateway.embedded.backends.openvino.following import WeightsFollower, version

PASSED_ON = ("PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS")
Array = npt.NDArray[Any]


class TritonPythonModel:
    """One model; `execute` merges the requests of a dynamic batch into one inference."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Return the configuration unchanged, as the exporter writes complete ones."""
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Compile the model. An error here keeps the model from becoming ready."""
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"], args["model_version"], config["default_model_filename"] or "model.onnx")
        followed = config["parameters"].get("FOLLOWED_WEIGHTS")
        weights = file.with_name(followed["string_value"]) if followed else None
        served = version(weights) if weights else ""
        try:
            self._compilations = Compilations(file, _properties(config["parameters"]))
        except RuntimeError as error:
            # The lines before the last one are locations in OpenVINO's source.
            reason = str(error).strip().rpartition("\n")[2]
            raise RuntimeError(f"{file} cannot be loaded by OpenVINO: {reason}") from None
        self._follower = None if weights is None else WeightsFollower(weights, served, self._compilations.read_again)
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run all requests as one batch. Triton guarantees that their shapes differ only in the batch axis."""
        parts = [[_input(request, name) for request in requests] for name in self._inputs]
        sizes = [len(part) for part in parts[0]]
        try:
            outputs = self._infer(dict(zip(self._inputs, parts, strict=True)))
        except Exception as error:
            failure = pb_utils.TritonError(f"OpenVINO: {error}")
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        return _split(outputs, sizes)

    def finalize(self) -> None:
        """Release the model's resources when Triton unloads it."""
        if self._follower is not None:
            self._follower.close()
        self._compilations.close()

    def _infer(self, parts: dict[str, list[Array]]) -> dict[str, Array]:
        batch = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
        return self._compilations.find(batch).infer(batch, self._outputs)


def _properties(parameters: dict[str, dict[str, str]]) -> dict[str, Any]:
    given = {key: entry["string_value"] for key, entry in parameters.items()}
    properties: dict[str, Any] = {key: given[key] for key in PASSED_ON if key in given}
    # Always set: on a CPU with bf16, OpenVINO uses it by default.
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
