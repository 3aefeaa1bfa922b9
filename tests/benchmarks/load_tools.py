"""NVIDIA's load generators: how each is installed, called and read.

Each lives in an environment of its own under build/, since none fits beside the project's packages. What comes back is
the time of every request, so that all of them are summed up by the same arithmetic, and what the tool itself has said.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import BUILD, ROOT, ToolError, run
from benchmarks.figures import percentile

INPUTS = Path(__file__).parent / "inputs"
NANOSECONDS = 1e9


@dataclass(frozen=True, kw_only=True)
class Address:
    """What is put under load: the model's id, its gateway or, for gRPC, its Triton; `key` is the gateway's."""

    url: str
    model: str
    key: str | None


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one number of requests in flight led to; `spans` are begin and end of each request in seconds."""

    in_flight: int
    spans: Sequence[tuple[float, float]]
    said: str

    @property
    def per_second(self) -> float:
        """Requests, each of which is one image, from the first one's begin to the last one's end."""
        return len(self.spans) / (max(end for _, end in self.spans) - min(begin for begin, _ in self.spans))

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(end - begin for begin, end in self.spans)

    @property
    def p95(self) -> float:
        """Seconds."""
        return percentile([end - begin for begin, end in self.spans], 0.95)


# Address, requests in flight, requests in all, a folder for what the tool writes -> what came of it.
Load = Callable[[Address, int, int, Path], Level]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """`name` is its folder under build/, `packages` what pip installs there; `grpc`: it speaks to Triton itself."""

    name: str
    packages: tuple[str, ...]
    load: Load
    grpc: bool = False


def _diffusion(address: Address, in_flight: int, requests: int, folder: Path) -> Level:
    """perf_analyzer on the model `diffusion`, which answers in a stream, and with it on what the model calls."""
    options = ["-m", "diffusion", "-i", "grpc", "--streaming", "--bls-composing-models", "unet"]
    return _perf_analyzer(
        address, [*options, "--input-data", str(INPUTS / "diffusion.json")], in_flight, requests, folder
    )


def _gateway(address: Address, in_flight: int, requests: int, folder: Path) -> Level:
    options = ["-m", address.model, "-i", "http", "--service-kind", "openai", "--endpoint", "v1/images/generations"]
    if address.key:
        options += ["-H", f"Authorization: Bearer {address.key}"]
    return _perf_analyzer(
        address, [*options, "--input-data", str(INPUTS / "gateway.json")], in_flight, requests, folder
    )


def _perf_analyzer(address: Address, options: Sequence[str], in_flight: int, requests: int, folder: Path) -> Level:
    tool = BUILD / "perf_analyzer"
    export = folder / "requests.json"
    load = ["--async", "--concurrency-range", str(in_flight), "--request-count", str(requests)]
    (runtime,) = tool.glob("lib/python3.*/site-packages/nvidia/cuda_runtime/lib")  # it is linked to CUDA, GPU or not
    said = run(
        [str(tool / "bin" / "perf_analyzer"), "-u", address.url, *options, *load, "--profile-export-file", str(export)],
        LD_LIBRARY_PATH=str(runtime),
    )
    (experiment,) = json.loads(export.read_text())["experiments"]
    spans = [
        (request["timestamp"] / NANOSECONDS, request["response_timestamps"][-1] / NANOSECONDS)
        for request in experiment["requests"]
    ]
    return Level(in_flight=in_flight, spans=spans, said=said)


def _aiperf(address: Address, in_flight: int, requests: int, folder: Path) -> Level:
    """It counts tokens before it sends them, and takes no tokenizer but a folder; any will do."""
    options = ["--model", address.model, "--url", address.url, "--endpoint-type", "image_generation", "--ui", "none"]
    options += ["--input-file", str(INPUTS / "prompts.jsonl"), "--custom-dataset-type", "single_turn"]
    options += ["--tokenizer", str(_tokenizer()), "--artifact-dir", str(folder)]
    options += ["--concurrency", str(in_flight), "--request-count", str(requests)]
    if address.key:
        options += ["--api-key", address.key]
    run([str(BUILD / "aiperf" / "bin" / "aiperf"), "profile", *options])
    records = [json.loads(line) for line in (folder / "profile_export.jsonl").read_text().splitlines()]
    if failed := [record["error"] for record in records if record.get("error")]:
        raise ToolError(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    # Its tables, without the log of its dozen processes.
    said = (folder / "profile_export_console.txt").read_text()
    return Level(in_flight=in_flight, spans=[_span(record["metadata"]) for record in records], said=said)


def _span(metadata: Mapping[str, Any]) -> tuple[float, float]:
    return metadata["request_start_ns"] / NANOSECONDS, metadata["request_end_ns"] / NANOSECONDS


def _tokenizer() -> Path:
    folder = BUILD / "tokenizer"
    shutil.copytree(ROOT / "export" / "emoji" / "checkpoint" / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    return folder


_PERF_ANALYZER = ("tritonclient==2.51.0", "nvidia-cuda-runtime-cu12")
TOOLS: Mapping[str, Tool] = {
    "diffusion": Tool(name="perf_analyzer", packages=_PERF_ANALYZER, load=_diffusion, grpc=True),
    "gateway": Tool(name="perf_analyzer", packages=_PERF_ANALYZER, load=_gateway),
    "aiperf": Tool(name="aiperf", packages=("aiperf==0.13.0",), load=_aiperf),
}
