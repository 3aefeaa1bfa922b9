"""Triton's configuration files, written with Triton's protobuf class so that Triton can parse them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hypergen_export.checkpoints.components import Component, Tensor
from hypergen_export.engines.engine import ENGINES, Size, is_in_bfloat16, model_file
from hypergen_export.engines.profiles import Graph, Shapes, graphs, input_shapes, largest_batch, profiles, typical_batch


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the components run: the engine, its precision, the shapes it is built for and the default image size."""

    engine: str
    dtype: str
    shapes: Shapes
    default_size: Size


def component_config(component: Component, options: EngineOptions) -> str:
    """The config.pbtxt of a component."""
    config = pb.ModelConfig(
        name=component.name,
        backend=options.engine,
        default_model_filename=model_file(ENGINES[options.engine], component, options.dtype),
        max_batch_size=options.shapes.rows,
        input=[_describe(pb.ModelInput(), tensor, options.shapes) for tensor in component.inputs],
        output=[_describe(pb.ModelOutput(), tensor, options.shapes) for tensor in component.outputs],
    )
    _CONFIGURE[options.engine](config, component, options)
    return _text(config)


def sampler_config(template: str, parameters: Mapping[str, str]) -> str:
    """The config.pbtxt of the sampler: the template with the checkpoint's parameters."""
    config = read_config(template)
    _set_parameters(config, parameters)
    return _text(config)


def read_config(text: str) -> Any:
    """Parse a config.pbtxt as Triton's ModelConfig."""
    return text_format.Parse(text, pb.ModelConfig())


def _configure_openvino(config: Any, component: Component, options: EngineOptions) -> None:
    """Parameters are named as in Triton's native OpenVINO backend.

    One stream, for latency: the sampler makes one call at a time, which gets all cores. Calls of the denoiser
    are batched by the sampler already, so a dynamic batcher would only add a thread in between.
    """
    if not component.is_denoiser:
        config.dynamic_batching.SetInParent()
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    # A file that is typed in bfloat16 is computed as it is typed: the hint would round the float32 parts of its graph.
    bf16 = "YES" if is_in_bfloat16(component, options.dtype) else "NO"
    _set_parameters(config, {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "HINT_BF16": bf16})
    if not any("height" in tensor.axes for tensor in component.inputs):
        _add_warm_up(config, component, options)


def _add_warm_up(config: Any, component: Component, options: EngineOptions) -> None:
    """Run a call for one image of the default size before the model is ready, so that no request waits for it.

    Components that take an image have no warm-up: not every request calls them, and their memory would stay
    allocated.
    """
    batch = typical_batch(component, options.shapes.rows)
    warm_up = config.model_warmup.add(name="default_size", batch_size=batch)
    shapes = input_shapes(component, options.shapes, options.default_size, batch)
    for entry in config.input:
        warmed = warm_up.inputs[entry.name]
        warmed.data_type, warmed.zero_data = entry.data_type, True
        warmed.dims.extend(shapes[entry.name][1:] or (1,))


def _configure_tensorrt(config: Any, component: Component, options: EngineOptions) -> None:
    """Use all profiles in one instance per GPU; unless they are named, Triton uses only the first."""
    config.dynamic_batching.SetInParent()
    config.max_batch_size = largest_batch(component, options.shapes.rows)
    names = [str(index) for index, _ in enumerate(profiles(component, options.shapes))]
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=1, profile=names)
    # Each profile has an execution context of its own. With ON_PROFILE_CHANGE a context allocates the memory of its
    # profile; otherwise each would allocate that of the largest.
    _set_parameters(config, {"execution_context_allocation_strategy": "ON_PROFILE_CHANGE"})
    for graph in graphs(component, options.shapes):
        _add_graph(config.optimization.cuda, graph)


def _add_graph(cuda: Any, graph: Graph) -> None:
    """Add a graph. Triton tries to record it in every profile and logs an error at start for each misfit."""
    cuda.graphs = True
    spec = cuda.graph_spec.add(batch_size=graph.batch)
    for name, shape in graph.inputs.items():
        spec.input[name].dim.extend(shape)


_CONFIGURE = {"openvino": _configure_openvino, "tensorrt": _configure_tensorrt}


def _describe(entry: Any, tensor: Tensor, shapes: Shapes) -> Any:
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
