"""The systems compared: this server, its components alone (the floor) and the peers; how each is installed and started.

Each peer runs at its best sensible configuration: a pipeline loaded once and reused, all cores, and its own defaults
except for checkpoint, scheduler, steps, guidance, size and, if supported, precision, which are the same for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import install, run
from benchmarks.targets import Server, Target, Worker, start_server, start_worker
from benchmarks.workloads import Workload, cache, repository

WORKERS = Path(__file__).parent / "workers"
TORCH = "torch==2.13.0"
CONVERT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The setup of a run: its folder, the `hypergen` command under test and the precision that it serves in."""

    work: Path
    hypergen: Path
    dtype: str

    def python_with(self, name: str, packages: tuple[str, ...]) -> Path:
        """The Python of a peer's environment, installed if need be."""
        return install(self.work / "environments" / name, packages)

    def log(self, name: str, workload: Workload) -> Path:
        return self.work / "logs" / f"{name}-{workload.name}.log"

    def converted(self, workload: Workload, kind: str) -> Path:
        """The folder of a checkpoint in a peer's own format."""
        return self.work / "converted" / f"{workload.name}-{kind}"


# Of Stable Diffusion's architecture.
UNETS = ("shipped", "sd15")
NO_Z_IMAGE = "it does not have the transformer's architecture, Z-Image"
Start = Callable[[Environment, Workload], Coroutine[Any, Any, Target]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`about` describes it in the report; `checkpoints` are those that it loads, `why_not` says why not all."""

    name: str
    about: str
    start: Start
    checkpoints: tuple[str, ...] = ("shipped", "flow", "sd15")
    why_not: str = ""


def _ours(dtype: str = "") -> Start:
    async def start(environment: Environment, workload: Workload) -> Server:
        """As a user starts it, on the checkpoint: the first start exports it."""
        command = [str(environment.hypergen), "serve", str(workload.checkpoint), "--dtype", dtype or environment.dtype]
        command += ["--cache-dir", str(cache(workload, environment.work))]
        name = f"ours-{dtype}" if dtype else "ours"
        return await start_server(name, command, "/health/ready", environment.log(name, workload), workload.limits)

    return start


def _hypergen(dtype: str) -> Start:
    async def start(environment: Environment, workload: Workload) -> Server:
        python = environment.python_with("hypergen", ("hypergen==0.1.0", TORCH))
        command = [str(python.parent / "hypergen"), "serve", str(workload.checkpoint), "--device", "cpu"]
        command += ["--dtype", dtype, "--max-batch-size", "8"]
        name = f"hypergen-{dtype}"
        return await start_server(name, command, "/health", environment.log(name, workload), workload.limits)

    return start


async def _floor(environment: Environment, workload: Workload) -> Worker:
    options = {
        "repository": str(repository(workload, environment.dtype, environment.work)),
        "precision": _openvino_precision(environment.dtype),
        "latent_channels": workload.latent_channels,
    }
    # The Python of the command under test has the components' packages.
    python = environment.hypergen.parent / "python"
    return await _work("floor", [str(python), str(WORKERS / "floor.py")], options, environment, workload)


def _diffusers(dtype: str, *, compiled: bool = False) -> Start:
    async def start(environment: Environment, workload: Workload) -> Worker:
        python = environment.python_with("diffusers", ("diffusers", "transformers", "accelerate", TORCH))
        options = {
            "checkpoint": str(workload.checkpoint),
            "dtype": dtype,
            "compile": compiled,
            # Compilation takes minutes and counts as loading.
            "first": {**asdict(next(workload.requests())), "steps": 1},
            "environment": {"TORCHINDUCTOR_CACHE_DIR": str(environment.work / "inductor")},
        }
        name = f"diffusers-{dtype}{'-compiled' if compiled else ''}"
        return await _work(name, [str(python), str(WORKERS / "pipeline.py")], options, environment, workload)

    return start


def _genai(pipelines: int = 1, *, reshaped: bool = False) -> Start:
    async def start(environment: Environment, workload: Workload) -> Worker:
        packages = ("openvino-genai==2026.4.1.0", "diffusers", "transformers", TORCH)
        python = environment.python_with("openvino_genai", packages)
        folder = environment.converted(workload, "genai")
        if not (folder / "model_index.json").exists():
            print(f"Converting {workload.name} for OpenVINO GenAI", file=sys.stderr)
            script = str(WORKERS / "convert_for_genai.py")
            run([str(python), script, str(workload.checkpoint), str(folder)], CONVERT_SECONDS)
        options: dict[str, Any] = {"converted": str(folder), "pipelines": pipelines}
        options["precision"] = _openvino_precision(environment.dtype)
        if reshaped:
            options["reshaped"] = asdict(workload.request)
        command = [str(python), str(WORKERS / "genai.py")]
        name = f"genai-{pipelines}{'-reshaped' if reshaped else ''}"
        return await _work(name, command, options, environment, workload)

    return start


async def _sdcpp(environment: Environment, workload: Workload) -> Worker:
    python = environment.python_with("stable_diffusion_cpp", ("stable-diffusion-cpp-python==0.4.7", "numpy"))
    folder = environment.converted(workload, "sdcpp")
    run([str(python), str(WORKERS / "convert_for_sdcpp.py"), str(workload.checkpoint), str(folder)], CONVERT_SECONDS)
    command = [str(python), str(WORKERS / "sdcpp.py")]
    return await _work("stable_diffusion_cpp", command, {"checkpoint": str(folder)}, environment, workload)


async def _work(
    name: str, command: list[str], options: dict[str, Any], environment: Environment, workload: Workload
) -> Worker:
    return await start_worker(name, command, options, environment.log(name, workload), workload.limits)


def _openvino_precision(dtype: str) -> str:
    return {"bfloat16": "bf16", "float32": "f32"}[dtype]


OURS = Peer(name="ours", about="`hypergen serve`, over HTTP", start=_ours())
FLOOR = Peer(
    name="floor",
    about="this server's components back to back in one process: OpenVINO and diffusers' scheduler, no server",
    start=_floor,
    checkpoints=UNETS,
    why_not="it has the loop for UNets alone",
)
HYPERGEN = Peer(
    name="hypergen", about="HyperGen 0.1.0 (PyTorch) as a server, float32, over HTTP", start=_hypergen("float32")
)
GENAI = Peer(
    name="openvino_genai",
    about="OpenVINO GenAI's Text2ImagePipeline, any size, in our precision",
    start=_genai(),
    checkpoints=UNETS,
    why_not=NO_Z_IMAGE,
)
GENAI_TWICE = Peer(name="openvino_genai_twice", about="the same, two pipelines with a core each", start=_genai(2))

# In order of measurement: peers with a bar come first.
PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        FLOOR,
        HYPERGEN,
        GENAI,
        Peer(
            name="stable_diffusion_cpp",
            about="stable-diffusion.cpp by its Python package, float16 weights, convolutions done directly",
            start=_sdcpp,
            checkpoints=("sd15",),
            why_not="it supports a fixed list of architectures, which does not include the shipped model's",
        ),
        Peer(name="hypergen_bfloat16", about="HyperGen 0.1.0 (PyTorch) in bfloat16", start=_hypergen("bfloat16")),
        Peer(
            name="openvino_genai_reshaped",
            about="OpenVINO GenAI compiled for this size and batch size 1",
            start=_genai(reshaped=True),
            checkpoints=UNETS,
            why_not=NO_Z_IMAGE,
        ),
        Peer(
            name="ours_float32",
            about="this server in float32, to compare within one precision",
            start=_ours("float32"),
            checkpoints=("shipped", "flow"),
            why_not="left out for the time it takes",
        ),
        Peer(
            name="ours_int8",
            about="this server in 8 bits (`--dtype int8`)",
            start=_ours("int8"),
            checkpoints=UNETS,
            why_not="8-bit activations are for UNets",
        ),
        Peer(name="diffusers_bfloat16", about="diffusers' pipeline in bfloat16", start=_diffusers("bfloat16")),
        Peer(name="diffusers", about="the same in float32", start=_diffusers("float32")),
        Peer(
            name="diffusers_compiled",
            about="the same in bfloat16, UNet and decoder by torch.compile",
            start=_diffusers("bfloat16", compiled=True),
            checkpoints=UNETS,
            why_not="measured with UNets alone",
        ),
    )
}
