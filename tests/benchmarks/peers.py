"""Who is measured: ours, the floor under it, and every peer; what each installs, and how it starts on a checkpoint.

Each peer at its best sensible configuration: a pipeline that is loaded once and reused, all cores, its own defaults for
everything but what has to be alike, which is checkpoint, scheduler, steps, guidance, size and, where it can, precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Server, Target, Worker, start_server, start_worker
from benchmarks.environments import install, run
from benchmarks.subjects import Workload, cache, repository

WORKERS = Path(__file__).parent / "workers"
TORCH = "torch==2.13.0"
CONVERT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and with what it is measured: `hypergen` is the command under test, `dtype` the precision of ours."""

    work: Path
    hypergen: Path
    dtype: str

    def environment(self, name: str, packages: tuple[str, ...]) -> Path:
        """The Python of a peer's environment, installed if need be."""
        return install(self.work / "environments" / name, packages)

    def log(self, name: str, subject: Workload) -> Path:
        return self.work / "logs" / f"{name}-{subject.name}.log"

    def converted(self, subject: Workload, kind: str) -> Path:
        """Where a peer's own form of the checkpoint is kept."""
        return self.work / "converted" / f"{subject.name}-{kind}"


Start = Callable[[Environment, Workload], Coroutine[Any, Any, Target]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`about` is what the report says of it; `subjects` are the checkpoints that it can load, with why if not all."""

    name: str
    about: str
    start: Start
    subjects: tuple[str, ...] = ("shipped", "sd15")
    why_not: str = ""


def _ours(dtype: str = "") -> Start:
    async def start(ground: Environment, subject: Workload) -> Server:
        """On the checkpoint, as a user starts it: it exports what is not exported yet."""
        command = [str(ground.hypergen), "serve", str(subject.checkpoint), "--dtype", dtype or ground.dtype]
        command += ["--cache-dir", str(cache(subject, ground.work))]
        name = f"ours-{dtype}" if dtype else "ours"
        return await start_server(name, command, "/health/ready", ground.log(name, subject), subject.limits)

    return start


def _hypergen(dtype: str) -> Start:
    async def start(ground: Environment, subject: Workload) -> Server:
        python = ground.environment("hypergen", ("hypergen==0.1.0", TORCH))
        command = [str(python.parent / "hypergen"), "serve", str(subject.checkpoint), "--device", "cpu"]
        command += ["--dtype", dtype, "--max-batch-size", "8"]
        name = f"hypergen-{dtype}"
        return await start_server(name, command, "/health", ground.log(name, subject), subject.limits)

    return start


async def _floor(ground: Environment, subject: Workload) -> Worker:
    options = {
        "repository": str(repository(subject, ground.dtype, ground.work)),
        "precision": _openvino_precision(ground.dtype),
        "latent_channels": subject.latent_channels,
    }
    # The components' own Python: that of the command under test.
    python = ground.hypergen.parent / "python"
    return await _work("floor", [str(python), str(WORKERS / "floor.py")], options, ground, subject)


def _diffusers(dtype: str, *, compiled: bool = False) -> Start:
    async def start(ground: Environment, subject: Workload) -> Worker:
        python = ground.environment("diffusers", ("diffusers", "transformers", "accelerate", TORCH))
        options = {
            "checkpoint": str(subject.checkpoint),
            "dtype": dtype,
            "compile": compiled,
            # Compiling takes minutes: it is part of loading.
            "first": {**asdict(next(subject.wishes())), "steps": 1},
            "environment": {"TORCHINDUCTOR_CACHE_DIR": str(ground.work / "inductor")},
        }
        name = f"diffusers-{dtype}{'-compiled' if compiled else ''}"
        return await _work(name, [str(python), str(WORKERS / "pipeline.py")], options, ground, subject)

    return start


def _genai(pipelines: int = 1, *, reshaped: bool = False) -> Start:
    async def start(ground: Environment, subject: Workload) -> Worker:
        packages = ("openvino-genai==2026.4.1.0", "diffusers", "transformers", TORCH)
        python = ground.environment("openvino_genai", packages)
        folder = ground.converted(subject, "genai")
        if not (folder / "model_index.json").exists():
            print(f"Converting {subject.name} for OpenVINO GenAI", file=sys.stderr)
            script = str(WORKERS / "convert_for_genai.py")
            run([str(python), script, str(subject.checkpoint), str(folder)], CONVERT_SECONDS)
        options: dict[str, Any] = {"converted": str(folder), "pipelines": pipelines}
        options["precision"] = _openvino_precision(ground.dtype)
        if reshaped:
            options["reshaped"] = asdict(subject.wish)
        command = [str(python), str(WORKERS / "genai.py")]
        name = f"genai-{pipelines}{'-reshaped' if reshaped else ''}"
        return await _work(name, command, options, ground, subject)

    return start


async def _sdcpp(ground: Environment, subject: Workload) -> Worker:
    python = ground.environment("stable_diffusion_cpp", ("stable-diffusion-cpp-python==0.4.7", "numpy"))
    folder = ground.converted(subject, "sdcpp")
    run([str(python), str(WORKERS / "convert_for_sdcpp.py"), str(subject.checkpoint), str(folder)], CONVERT_SECONDS)
    command = [str(python), str(WORKERS / "sdcpp.py")]
    return await _work("stable_diffusion_cpp", command, {"checkpoint": str(folder)}, ground, subject)


async def _work(
    name: str, command: list[str], options: dict[str, Any], ground: Environment, subject: Workload
) -> Worker:
    return await start_worker(name, command, options, ground.log(name, subject), subject.limits)


def _openvino_precision(dtype: str) -> str:
    return {"bfloat16": "bf16", "float32": "f32"}[dtype]


OURS = Peer(name="ours", about="`hypergen serve`, asked over HTTP", start=_ours())
FLOOR = Peer(
    name="floor",
    about="our components back to back in one process, OpenVINO and diffusers' scheduler, nothing around them",
    start=_floor,
)
HYPERGEN = Peer(
    name="hypergen", about="HyperGen 0.1.0 as its server, float32, asked over HTTP", start=_hypergen("float32")
)
GENAI = Peer(
    name="openvino_genai", about="OpenVINO GenAI's Text2ImagePipeline, any size, in our precision", start=_genai()
)
GENAI_TWICE = Peer(name="openvino_genai_twice", about="the same, two pipelines with a core each", start=_genai(2))

# In the order in which they are measured: those that a bar names come first.
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
            subjects=("sd15",),
            why_not="it knows a fixed list of architectures, and the shipped model's widths are none of them",
        ),
        Peer(name="hypergen_bfloat16", about="HyperGen 0.1.0 in bfloat16", start=_hypergen("bfloat16")),
        Peer(
            name="openvino_genai_reshaped",
            about="OpenVINO GenAI compiled for one picture of this one size at a time and nothing else",
            start=_genai(reshaped=True),
        ),
        Peer(
            name="ours_float32",
            about="ours in float32, for those who compare within one precision",
            start=_ours("float32"),
            subjects=("shipped",),
            why_not="left out for the time it takes",
        ),
        Peer(name="diffusers_bfloat16", about="diffusers' pipeline in bfloat16", start=_diffusers("bfloat16")),
        Peer(name="diffusers", about="the same in float32", start=_diffusers("float32")),
        Peer(
            name="diffusers_compiled",
            about="the same in bfloat16, UNet and decoder by torch.compile",
            start=_diffusers("bfloat16", compiled=True),
        ),
    )
}
