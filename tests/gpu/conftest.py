"""A GPU machine: a checkpoint is built into plans, Triton serves them, the real gateway stands in front.

`tests/gpu/run` starts these tests in Triton's own container. They skip, and say why, where something is missing. What
they measure is printed as a table at the end and kept in build/gpu/figures.md.

HYPERGEN_GPU_CHECKPOINT is a hub id or a folder; without it, it is the architecture of Stable Diffusion 1.5 with random
weights.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from benchmarks.full_size import ARCHITECTURES, Cost, measure, save_checkpoint
from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.engines.cuda import Gpu, first_gpu
from hypergen_export.errors import NoGpuError
from support.running_server import Server, free_port, start_server, stop_server

ROOT = Path(__file__).parents[2]
SIZE = (512, 512)
IMAGES = 4
START_SECONDS = 600
FIGURES = pytest.StashKey[dict[str, str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, and the file that keeps it."""
    figures = config.stash.get(FIGURES, {})
    if not figures:
        return
    lines = ["| on this GPU | |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in figures.items())]
    terminalreporter.section("figures")
    terminalreporter.write_line("\n".join(lines))
    folder = ROOT / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.md").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> dict[str, str]:
    """What the table says: tests put their rows here."""
    found: dict[str, str] = request.config.stash.setdefault(FIGURES, {})
    return found


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The GPU; everything here depends on it."""
    try:
        found = first_gpu()
    except NoGpuError as error:
        pytest.skip(str(error))
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed for this Python: tests/gpu/run brings it")
    if shutil.which("tritonserver") is None:
        pytest.skip("there is no tritonserver: tests/gpu/run starts Triton's own container")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA, and is what the figures are compared with")
    return found


@pytest.fixture(scope="session")
def checkpoint(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory, figures: dict[str, str]) -> Checkpoint:
    """The checkpoint that was named, else one of random weights."""
    figures["GPU"] = f"{gpu.name}, compute capability {gpu.compute_capability}"
    model = os.environ.get("HYPERGEN_GPU_CHECKPOINT", "")
    figures["checkpoint"] = model or "the architecture of Stable Diffusion 1.5, random weights"
    if not model:
        folder = tmp_path_factory.mktemp("random") / "checkpoint"
        save_checkpoint(folder, ARCHITECTURES["sd-1.5"])
        model = str(folder)
    return open_checkpoint(model)


@dataclass(frozen=True)
class Plans:
    """A repository of plans, and what it cost to make."""

    repository: Path
    cost: Cost


@pytest.fixture(scope="session")
def plans(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    repository = tmp_path_factory.mktemp("plans") / "repository"
    options = ["--engine", "tensorrt", "--dtype", "float16", "--sizes", f"{SIZE[0]}x{SIZE[1]}"]
    options += ["--max-batch-size", str(IMAGES), "--output", str(repository)]
    cost = measure([sys.executable, "-m", "hypergen_export", str(checkpoint.folder), *options])
    return Plans(repository, cost)


@dataclass(frozen=True)
class Triton:
    """A running tritonserver with its log, which counts the CUDA graphs that were launched."""

    grpc: str
    metrics_url: str
    log: Path
    seconds_to_ready: float

    def graphs_of(self, model: str) -> tuple[int, int]:
        """Executions of a model by a CUDA graph and without, in the words of Triton's TensorRT backend."""
        text = self.log.read_text(errors="replace")
        return text.count(f"is launching CUDA graph for {model}_"), text.count(f"is being executed for {model}_")

    def metric(self, name: str) -> float:
        """The first value of a metric."""
        lines = httpx.get(self.metrics_url, timeout=10).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="session")
def triton(plans: Plans, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Started as docker/triton.Dockerfile does it, the check of the plans included, and with a talkative log."""
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    log = tmp_path_factory.mktemp("triton") / "log"
    command = [sys.executable, str(ROOT / "docker" / "triton" / "check_plans.py"), "tritonserver"]
    command += [f"--model-repository={plans.repository}", "--disable-auto-complete-config", "--log-verbose=1"]
    command += ["--backend-config=python,thread-pool-size=64"]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    # The sampler runs in the image's own Python, whose packages the image has put where this points.
    environment = os.environ | {"PYTHONPATH": os.environ.get("HYPERGEN_TRITON_PYTHONPATH", "")}
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_ready(f"127.0.0.1:{ports['grpc']}", process, log)
        metrics = f"http://127.0.0.1:{ports['metrics']}/metrics"
        yield Triton(f"127.0.0.1:{ports['grpc']}", metrics, log, time.monotonic() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_until_ready(grpc: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    client = InferenceServerClient(grpc)
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, f"Triton is not ready after {START_SECONDS} s"
        try:
            if client.is_server_ready(client_timeout=5):
                break
        except InferenceServerException:
            pass  # it does not listen yet
        time.sleep(0.5)
    client.close()


@pytest.fixture(scope="session")
def gateway(triton: Triton) -> Iterator[Server]:
    running = start_server("--triton-url", triton.grpc, model="")
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


@pytest.fixture(scope="session")
def pipeline(checkpoint: Checkpoint) -> Any:
    """diffusers' own pipeline on the GPU in float16, as its documentation has it."""
    from diffusers import DiffusionPipeline

    loaded: Any = DiffusionPipeline.from_pretrained(checkpoint.folder, torch_dtype=torch.float16).to("cuda")
    loaded.set_progress_bar_config(disable=True)
    return loaded
