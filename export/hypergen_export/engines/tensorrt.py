"""Build a TensorRT plan from an ONNX file, and write the record beside it.

Uses the API that TensorRT 10.12 to 11 and TensorRT-RTX have in common. The network is strongly typed: it is computed in
the types of the ONNX, and no flag lowers them. `profiles` defines the shapes.

A TensorRT plan runs on the kind of GPU and in the release that built it: see `local_target`. TensorRT-RTX builds ahead
of time and needs no GPU. Triton cannot load its plans, but the tests use it to check on any machine that TensorRT
accepts our ONNX, types and profiles. Neither library is imported before something is built.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.components import FP8, INT8
from hypergen_export.checkpoints.weights import sha256
from hypergen_export.engines.cuda import first_gpu
from hypergen_export.engines.profiles import Profile
from hypergen_export.errors import BadOptionError, ConversionError, MissingDependencyError

# Limit of a tactic's scratch memory. Without one it may take the whole GPU, which other models share.
_WORKSPACE_BYTES = 8 * 2**30
# TensorRT's names of data types -> Triton's.
_TYPES = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT32": "INT32", "INT64": "INT64", "UINT8": "UINT8"}
# Precision -> the first compute capability that has it. Turing has int8, too, but not bfloat16, in which the layers
# that are not quantised are computed. fp8 came with Ada and Hopper.
_SINCE = {"bfloat16": (8, 0), INT8: (8, 0), FP8: (8, 9)}

Report = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The building library and the GPU to build for. `gpu` is empty for a build ahead of time."""

    library: str
    version: str
    gpu: str
    compute_capability: str

    def check_dtype(self, dtype: str) -> None:
        """Reject a precision that the GPU does not have. Raises BadOptionError."""
        since = _SINCE.get(dtype, (0, 0))
        capability = tuple(int(part) for part in self.compute_capability.split("."))
        if capability < since:
            advice = "float16" if capability < _SINCE["bfloat16"] else "bfloat16 or, for a UNet, int8"
            raise BadOptionError(
                f"--dtype {dtype}: needs a GPU of compute capability {since[0]}.{since[1]} or later, but "
                f"{self.gpu or 'the target GPU'} has {self.compute_capability}; use {advice}"
            )


@dataclass(frozen=True, kw_only=True)
class Binding:
    """An input or output of an engine: Triton's name of its type, and its shape with -1 for free axes."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The tensors of an engine by name."""

    inputs: Mapping[str, Binding]
    outputs: Mapping[str, Binding]


def local_target() -> Target:
    """TensorRT and the GPU of this machine. Raises MissingDependencyError, NoGpuError."""
    version = _import("tensorrt").__version__
    gpu = first_gpu()
    return Target(library="tensorrt", version=version, gpu=gpu.name, compute_capability=gpu.compute_capability)


def rtx_target(compute_capability: str) -> Target:
    """TensorRT-RTX, for GPUs of a compute capability such as "8.6". Raises MissingDependencyError, BadOptionError."""
    trt = _import("tensorrt_rtx")
    if _capability_name(compute_capability) not in trt.ComputeCapability.__members__:
        raise BadOptionError(f"TensorRT-RTX does not support the compute capability {compute_capability}")
    return Target(library="tensorrt_rtx", version=trt.__version__, gpu="", compute_capability=compute_capability)


@dataclass(frozen=True, kw_only=True)
class Build:
    """The build of a component's plan from its ONNX file, whose weights are of `dtype`."""

    name: str
    onnx: Path
    dtype: str
    plan: Path
    profiles: Sequence[Profile]
    target: Target


def build_plan(build: Build, report: Report) -> Interface:
    """Write the plan; `report` is called with the fraction done, from 0 to 1.

    Raises:
        ConversionError: TensorRT rejects the file or cannot build the engine.
        OSError: the plan cannot be written.
    """
    trt = importlib.import_module(build.target.library)
    log = _make_log(trt)
    builder = trt.Builder(log)
    # Needed up to TensorRT 10. From 11 on all networks are strongly typed and the flag has no effect.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # owns the network's weights, so it must live until the plan is built
    if not parser.parse_from_file(str(build.onnx)):
        raise ConversionError(f"{build.name}: TensorRT cannot read the ONNX ({_parser_error(parser)})")
    config = _configure(trt, builder, build)
    monitor = _make_monitor(trt, report)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise ConversionError(f"{build.name}: TensorRT cannot build the engine ({log.first_error})")
    build.plan.write_bytes(serialized)
    return _interface(network)


def write_plan_record(build: Build, interface: Interface) -> None:
    """Write the plan's record beside it: its target, its ONNX file, its interface and its profiles."""
    record = {
        **asdict(build.target),
        "dtype": build.dtype,
        "onnx_sha256": sha256(onnx_files(build.onnx)),
        **asdict(interface),
        "profiles": [{name: asdict(bounds) for name, bounds in profile.items()} for profile in build.profiles],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    build.plan.with_name(f"{build.plan.name}.json").write_text(text + "\n", encoding="utf-8")


def onnx_files(onnx: Path) -> list[Path]:
    """An ONNX file and the files with its weights, which are alone with it in their folder."""
    return sorted({*onnx.parent.glob(f"{onnx.name}*"), *onnx.parent.glob("*.safetensors")})


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{library} is not installed; TensorRT engines must be built by Triton's own TensorRT release, "
            "for example in Triton's container"
        ) from error


def _capability_name(compute_capability: str) -> str:
    return "SM" + compute_capability.replace(".", "")


def _configure(trt: Any, builder: Any, build: Build) -> Any:
    """The builder's configuration. Without a timing cache: with one, TensorRT-RTX would look for a GPU."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    if not build.target.gpu:
        config.num_compute_capabilities = 1
        capability = trt.ComputeCapability.__members__[_capability_name(build.target.compute_capability)]
        config.set_compute_capability(capability, 0)
    for profile in build.profiles:
        shapes = builder.create_optimization_profile()
        for name, bounds in profile.items():
            shapes.set_shape(name, bounds.smallest, bounds.usual, bounds.largest)
        config.add_optimization_profile(shapes)
    return config


def _parser_error(parser: Any) -> str:
    """The parser's first error, on one line."""
    error = parser.get_error(0)
    where = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{where}: {' '.join(error.desc().split())}"[:300]


def _interface(network: Any) -> Interface:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return Interface(inputs=_bindings(inputs), outputs=_bindings(outputs))


def _bindings(tensors: Sequence[Any]) -> dict[str, Binding]:
    return {tensor.name: Binding(dtype=_TYPES[tensor.dtype.name], shape=tuple(tensor.shape)) for tensor in tensors}


def _make_log(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps the first error."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = "no reason given"
            self._silent = False

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and not self._silent:
                self.first_error, self._silent = " ".join(message.split())[:300], True

    return Log()


def _make_monitor(trt: Any, report: Report) -> Any:
    """A TensorRT progress monitor that calls `report` and stops the build on KeyboardInterrupt.

    TensorRT calls it from C++, which no exception may cross.
    """
    phases = Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._do(lambda: phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._do(lambda: phases.complete(phase_name, step))
            self._do(lambda: report(phases.fraction))
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._do(lambda: phases.finish(phase_name))

        def _do(self, action: Callable[[], None]) -> None:
            try:
                action()
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()


class Phases:
    """Progress of a build as nested phases, each of which counts steps; a step may be a phase itself."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[float, int]] = {}
        self._parents: dict[str, str | None] = {}
        self.fraction = 0.0
        """From 0 to 1, never decreasing."""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Start a phase, as a step of `parent`."""
        self._steps[name] = (0, max(steps, 1))
        self._parents[name] = parent

    def complete(self, name: str, step: int) -> None:
        """Mark step number `step`, from 0, as done."""
        if name in self._steps:
            self._steps[name] = (step + 1, self._steps[name][1])
            self.fraction = max(self.fraction, min(self._outermost(name), 1.0))

    def finish(self, name: str) -> None:
        """End a phase, whether it is complete or not."""
        self._steps.pop(name, None)
        self._parents.pop(name, None)

    def _outermost(self, name: str) -> float:
        """The fraction of the outermost phase that is done, computed from the nested phase `name`."""
        done, steps = self._steps[name]
        share = done / steps
        parent = self._parents[name]
        while parent in self._steps:
            done, steps = self._steps[parent]
            share = (done + min(share, 1.0)) / steps
            parent = self._parents[parent]
        return share
