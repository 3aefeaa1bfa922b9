"""Triton's configuration files, made through Triton's own protobuf class: what it prints, Triton can parse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hypergen_export.components import Component, Sizes, Tensor

MODEL_FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the components run: `dtype` is what the engine computes in, `rows` the largest batch."""

    engine: str
    dtype: str
    rows: int

    @property
    def parameters(self) -> dict[str, str]:
        """The backend's parameters, under the names of Triton's native OpenVINO backend.

        One stream, for latency: the sampler makes one call at a time, and that call gets all cores.
        """
        bf16 = "YES" if self.dtype == "bfloat16" else "NO"
        return {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "HINT_BF16": bf16}


def component_config(component: Component, sizes: Sizes, options: EngineOptions) -> str:
    """config.pbtxt of a component."""
    config = pb.ModelConfig(
        name=component.name,
        backend=options.engine,
        default_model_filename=MODEL_FILE,
        max_batch_size=options.rows,
        input=[_fill(pb.ModelInput(), tensor, sizes) for tensor in component.inputs],
        output=[_fill(pb.ModelOutput(), tensor, sizes) for tensor in component.outputs],
        instance_group=[pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)],
    )
    config.dynamic_batching.SetInParent()
    _set_parameters(config, options.parameters)
    return _text(config)


def sampler_config(template: str, parameters: Mapping[str, str]) -> str:
    """config.pbtxt of the sampler: the template with the checkpoint's parameters."""
    config = read_config(template)
    _set_parameters(config, parameters)
    return _text(config)


def known_schedulers(template: str) -> list[str]:
    """The names under which a request may ask the sampler for a scheduler."""
    names: str = read_config(template).parameters["schedulers"].string_value
    return names.split(",")


def read_config(text: str) -> Any:
    """A config.pbtxt as Triton's ModelConfig."""
    return text_format.Parse(text, pb.ModelConfig())


def _fill(entry: Any, tensor: Tensor, sizes: Sizes) -> Any:
    entry.name = tensor.name
    entry.data_type = pb.DataType.Value(f"TYPE_{tensor.dtype}")
    dims = tensor.dims(sizes)
    entry.dims.extend(dims or (1,))
    if not dims:  # Triton has no dimensionless input: [B, 1] outside is [B] for the model
        entry.reshape.SetInParent()
    return entry


def _set_parameters(config: Any, parameters: Mapping[str, str]) -> None:
    for name, value in parameters.items():
        config.parameters[name].string_value = value


def _text(config: Any) -> str:
    text: str = text_format.MessageToString(config)
    return text
