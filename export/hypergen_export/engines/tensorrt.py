"""ONNX to a TensorRT plan: the network, its profiles, the build, and the record that lies beside the plan.

Knows the API of TensorRT 10.12 to 11 and of TensorRT-RTX, in which they are alike. The network is strongly typed: what
it computes in are the types of the ONNX, and no flag lowers them. What shapes it is built for stands in `profiles`.

TensorRT builds on the GPU that will run the plan, and in its own release only: see `this_machine`. TensorRT-RTX builds
ahead of time and needs no GPU. Triton cannot load what it builds; but it shows on any machine that our ONNX, types and
profiles are what TensorRT takes. Neither is imported before something is built.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.weights import sha256
from hypergen_export.engines.cuda import first_gpu
from hypergen_export.engines.profiles import Profile
from hypergen_export.errors import BadOptionError, ConversionError, MissingDependencyError

# A tactic's scratch memory. Without a limit it may be the whole GPU, which the served model has to share.
_WORKSPACE_BYTES = 8 * 2**30
# TensorRT's names for the types that our tables use -> Triton's.
_TYPES = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT32": "INT32", "INT64": "INT64", "UINT8": "UINT8"}
# Tensor cores compute in bfloat16 since Ampere.
_BFLOAT16_SINCE = (8, 0)

Report = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The library that builds, and what GPU for. `gpu` is empty where it is built ahead of time."""

    library: str
    version: str
    gpu: str
    compute_capability: str

    def check_dtype(self, dtype: str) -> None:
        """Refuse what the GPU does not compute in. Raises BadOptionError."""
        capability = tuple(int(part) for part in self.compute_capability.split("."))
        if dtype == "bfloat16" and capability < _BFLOAT16_SINCE:
            raise BadOptionError(
                f"--dtype bfloat16: needs a GPU of compute capability 8.0 or later, and "
                f"{self.gpu or 'the one to build for'} has {self.compute_capability}; use float16"
            )


@dataclass(frozen=True, kw_only=True)
class Binding:
    """An input or output of an engine: its type in Triton's words, and its shape, -1 where that is free."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The tensors of an engine by name."""

    inputs: Mapping[str, Binding]
    outputs: Mapping[str, Binding]


def this_machine() -> Target:
    """TensorRT and the GPU of this machine. Raises MissingDependencyError, NoGpuError."""
    version = _import("tensorrt").__version__
    gpu = first_gpu()
    return Target(library="tensorrt", version=version, gpu=gpu.name, compute_capability=gpu.compute_capability)


def ahead_of_time(compute_capability: str) -> Target:
    """TensorRT-RTX, for GPUs of a compute capability such as "8.6". Raises MissingDependencyError, BadOptionError."""
    trt = _import("tensorrt_rtx")
    if _capability_name(compute_capability) not in trt.ComputeCapability.__members__:
        raise BadOptionError(f"TensorRT-RTX builds nothing for the compute capability {compute_capability}")
    return Target(library="tensorrt_rtx", version=trt.__version__, gpu="", compute_capability=compute_capability)


@dataclass(frozen=True, kw_only=True)
class Build:
    """A plan to build: of which component, from which ONNX with weights of `dtype`, into which file, for what."""

    name: str
    onnx: Path
    dtype: str
    plan: Path
    profiles: Sequence[Profile]
    target: Target


def build_plan(build: Build, report: Report) -> Interface:
    """Write the plan; `report` is told how much is done, from 0 to 1.

    Raises:
        ConversionError: TensorRT refuses the file or cannot build it.
        OSError: the plan cannot be written.
    """
    trt = importlib.import_module(build.target.library)
    log = _make_log(trt)
    builder = trt.Builder(log)
    # Needed up to 10, where it is a choice; from 11 on there is nothing else and the flag is without effect.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # the network's weights are its own: it must live until they are in the plan
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
    """Write beside the plan how it was built, of what, for what, and its interface."""
    record = {
        **asdict(build.target),
        "dtype": build.dtype,
        "onnx_sha256": sha256(sorted(build.onnx.parent.glob(f"{build.onnx.name}*"))),  # weights may lie beside it
        **asdict(interface),
        "profiles": [{name: asdict(bounds) for name, bounds in profile.items()} for profile in build.profiles],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    build.plan.with_name(f"{build.plan.name}.json").write_text(text + "\n", encoding="utf-8")


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{library} is not installed; TensorRT engines must be built by the very release that Triton brings, "
            "best inside Triton's own container"
        ) from error


def _capability_name(compute_capability: str) -> str:
    return "SM" + compute_capability.replace(".", "")


def _configure(trt: Any, builder: Any, build: Build) -> Any:
    """No timing cache: it holds for one GPU and release, and because of it TensorRT-RTX would look for a GPU."""
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
    """The first thing that the parser refuses, on one line."""
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
    """A logger of TensorRT's that says nothing and keeps the first error."""

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
    """A monitor of TensorRT's that reports progress, and ends the build where it is interrupted.

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
    """How far a build is. Its phases lie inside each other and count steps; a step of one may be a phase itself."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[float, int]] = {}
        self._parents: dict[str, str | None] = {}
        self.fraction = 0.0
        """From 0 to 1, and never less than it was."""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, as a step of `parent`."""
        self._steps[name] = (0, max(steps, 1))
        self._parents[name] = parent

    def complete(self, name: str, step: int) -> None:
        """The step of this number, from 0, is done."""
        if name in self._steps:
            self._steps[name] = (step + 1, self._steps[name][1])
            self.fraction = max(self.fraction, min(self._outermost(name), 1.0))

    def finish(self, name: str) -> None:
        """A phase is done or given up."""
        self._steps.pop(name, None)
        self._parents.pop(name, None)

    def _outermost(self, name: str) -> float:
        """The share of the outermost phase that is done, as seen from the phase `name`."""
        done, steps = self._steps[name]
        share = done / steps
        parent = self._parents[name]
        while parent in self._steps:
            done, steps = self._steps[parent]
            share = (done + min(share, 1.0)) / steps
            parent = self._parents[parent]
        return share
