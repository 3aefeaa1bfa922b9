"""Triton's configuration files, made through Triton's own protobuf class: what it prints, Triton can parse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hypergen_export.checkpoints.components import Component, Tensor
from hypergen_export.engines.engine import ENGINES, Size
from hypergen_export.engines.profiles import Graph, Shapes, graphs, input_shapes, largest_batch, profiles, usual_batch


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the components run: `dtype` is what the engine computes in, `shapes` what for.

    `usual_size` is that of the pictures that most requests want.
    """

    engine: str
    dtype: str
    shapes: Shapes
    usual_size: Size


def component_config(component: Component, options: EngineOptions) -> str:
    """config.pbtxt of a component."""
    config = pb.ModelConfig(
        name=component.name,
        backend=options.engine,
        default_model_filename=ENGINES[options.engine].file,
        max_batch_size=options.shapes.rows,
        input=[_fill(pb.ModelInput(), tensor, options.shapes) for tensor in component.inputs],
        output=[_fill(pb.ModelOutput(), tensor, options.shapes) for tensor in component.outputs],
    )
    _COMPLETE[options.engine](config, component, options)
    return _text(config)


def sampler_config(template: str, parameters: Mapping[str, str]) -> str:
    """config.pbtxt of the sampler: the template with the checkpoint's parameters."""
    config = read_config(template)
    _set_parameters(config, parameters)
    return _text(config)


def read_config(text: str) -> Any:
    """A config.pbtxt as Triton's ModelConfig."""
    return text_format.Parse(text, pb.ModelConfig())


def _complete_openvino(config: Any, component: Component, options: EngineOptions) -> None:
    """The parameters have the names of Triton's native OpenVINO backend.

    One stream, for latency: the sampler makes one call at a time, and that call gets all cores. Its steps come in
    batches already; a batcher before the UNet would find nothing to merge, and hand each on by one more thread.
    """
    if component.module != "unet":
        config.dynamic_batching.SetInParent()
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    bf16 = "YES" if options.dtype == "bfloat16" else "NO"
    _set_parameters(config, {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "HINT_BF16": bf16})
    if not any("height" in tensor.axes for tensor in component.inputs):
        _add_warm_up(config, component, options)


def _add_warm_up(config: Any, component: Component, options: EngineOptions) -> None:
    """One picture of the usual size before the model is ready: nobody waits for what a first call takes longer.

    Not of what starts from a picture, as not every request does, and its memory would be taken for good.
    """
    batch = usual_batch(component, options.shapes.rows)
    warm_up = config.model_warmup.add(name="usual_size", batch_size=batch)
    shapes = input_shapes(component, options.shapes, options.usual_size, batch)
    for entry in config.input:
        warmed = warm_up.inputs[entry.name]
        warmed.data_type, warmed.zero_data = entry.data_type, True
        warmed.dims.extend(shapes[entry.name][1:] or (1,))


def _complete_tensorrt(config: Any, component: Component, options: EngineOptions) -> None:
    """All profiles in one instance per GPU: unnamed, Triton would use the first alone."""
    config.dynamic_batching.SetInParent()
    config.max_batch_size = largest_batch(component, options.shapes.rows)
    names = [str(index) for index, _ in enumerate(profiles(component, options.shapes))]
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=1, profile=names)
    # Each profile has a context that never leaves it. Allocated on its change, a context takes the memory that its
    # own profile needs; otherwise each would take that of the largest.
    _set_parameters(config, {"execution_context_allocation_strategy": "ON_PROFILE_CHANGE"})
    for graph in graphs(component, options.shapes):
        _add_graph(config.optimization.cuda, graph)


def _add_graph(cuda: Any, graph: Graph) -> None:
    """Triton tries to record each graph in every profile, and at start logs an error for those that it does not fit."""
    cuda.graphs = True
    spec = cuda.graph_spec.add(batch_size=graph.batch)
    for name, shape in graph.inputs.items():
        spec.input[name].dim.extend(shape)


_COMPLETE = {"openvino": _complete_openvino, "tensorrt": _complete_tensorrt}


def _fill(entry: Any, tensor: Tensor, shapes: Shapes) -> Any:
    entry.name = tensor.name
    entry.data_type = pb.DataType.Value(f"TYPE_{tensor.dtype}")
    entry.dims.extend(tensor.dims(shapes.sizes))
    return entry


def _set_parameters(config: Any, parameters: Mapping[str, str]) -> None:
    for name, value in parameters.items():
        config.parameters[name].string_value = value


def _text(config: Any) -> str:
    text: str = text_format.MessageToString(config)
    return text
