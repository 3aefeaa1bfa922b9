"""Server overhead: start-up, requests that generate nothing, and the gateway's share of an image's time."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tritonclient.grpc import InferenceServerClient

from benchmarks.environments import ToolError, run
from benchmarks.figures import Figures, Pairs, latency_figures, percentile, rate_figures
from benchmarks.measures.turns import Bench
from benchmarks.peers import HYPERGEN, OURS, Peer
from benchmarks.targets import GenerationRequest, Server
from benchmarks.workloads import Workload
from support.plain_triton import tensor

WRK_SECONDS = 5
CONNECTIONS = 8
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


async def start(bench: Bench, workload: Workload) -> None:
    """Time from the command to the first image, with a warm and a cold page cache, against HyperGen 0.1."""
    for kind in ("warm", "cold"):
        name = f"start_{kind}_{workload.name}_hypergen_over_ours"
        taken: tuple[list[float], list[float]] = ([], [])
        try:
            for _ in range(bench.budget.rounds):
                for side, peer in enumerate((OURS, HYPERGEN)):
                    if kind == "cold":
                        _drop_caches()
                    taken[side].append(await _first_image(bench, peer, workload))
            bench.enter(latency_figures(name, "hypergen", Pairs(*taken)))
        except ToolError as error:
            bench.fail(name, error)


async def _first_image(bench: Bench, peer: Peer, workload: Workload) -> float:
    began = time.perf_counter()
    async with bench.running(peer, workload) as target:
        await target.generate(next(workload.requests()))
        return time.perf_counter() - began


def _drop_caches() -> None:
    """Drop the page cache. Raises ToolError without the permission to."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError as error:
        raise ToolError(f"a cold start needs root, to empty the system's cache of files: {error.strerror}") from error


async def first_start(bench: Bench, workload: Workload) -> None:
    """Time of the first start with an empty cache: export, parity check against torch, first image."""
    name = f"start_first_{workload.name}_ours_s"
    with tempfile.TemporaryDirectory(dir=bench.environment.work) as work:
        try:
            first = replace(bench, environment=replace(bench.environment, work=Path(work)))
            bench.enter({name: round(await _first_image(first, OURS, workload), 1)})
        except ToolError as error:
            bench.fail(name, error)


async def models_per_second(bench: Bench, workload: Workload) -> None:
    """`GET /v1/models` by wrk over eight connections, in alternation."""
    name = "models_per_second_ours_over_hypergen"
    if shutil.which("wrk") is None:
        bench.fail(name, "wrk is not installed: apt-get install wrk")
        return
    rates: tuple[list[float], list[float]] = ([], [])
    try:
        async with bench.running(OURS, workload) as ours, bench.running(HYPERGEN, workload) as theirs:
            for _ in range(bench.budget.rounds):
                for side, server in enumerate((ours, theirs)):
                    rates[side].append(_wrk(server))
        bench.enter(rate_figures(name, "hypergen", Pairs(*rates)))
    except ToolError as error:
        bench.fail(name, error)


def _wrk(server: Server) -> float:
    """Requests per second. Raises ToolError if any failed."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{WRK_SECONDS}s", f"{server.url}/v1/models"]
    said = run(command, 10 * WRK_SECONDS)
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", said)
    if rate is None or "Non-2xx" in said or "Socket errors" in said:
        raise ToolError(f"wrk on {server.name}: {said[-500:]}")
    return float(rate[1])


async def gateway(bench: Bench, workload: Workload) -> None:
    """The time that HTTP adds to an image compared with calling Triton directly, in alternation; medians of both.

    Both clients are plain and keep their connection: the one ends when the answer's body is read, undecoded, the other
    when the pixels are there.
    """
    try:
        async with bench.running(OURS, workload) as ours:
            for steps, name in ((workload.request.steps, "gateway_share_ms"), (1, "gateway_share_one_step_ms")):
                bench.enter(_gateway_share(name, ours, workload.requests(steps=steps), bench.budget.pairs))
    except ToolError as error:
        bench.fail("gateway_share_ms", error)


def _gateway_share(name: str, ours: Server, requests: Iterator[GenerationRequest], count: int) -> Figures:
    with _Gateway(ours) as over_http, _Triton(ours) as directly:
        http_ms: list[float] = []
        triton_ms: list[float] = []
        outside_ms: list[float] = []
        for number in range(count + 1):
            request = next(requests)
            turns: list[tuple[list[float], Callable[[GenerationRequest], float]]] = [
                (http_ms, over_http),
                (triton_ms, directly),
            ]
            for taken, ask in turns if number % 2 else reversed(turns):
                taken.append(ask(request) * 1e3)
            outside_ms.append(over_http.outside_ms)
    differences = [over - direct for over, direct in zip(http_ms[1:], triton_ms[1:], strict=True)]
    return {
        name: round(statistics.median(differences), 2),
        f"{name}_p95": round(percentile(differences, 0.95), 2),
        f"{name}_http_median": round(statistics.median(http_ms[1:]), 2),
        f"{name}_triton_median": round(statistics.median(triton_ms[1:]), 2),
        f"{name}_pairs": count,
        # By the server's own clock: the whole request minus the sampler's own timings.
        f"{name}_by_its_own_timings": round(statistics.median(outside_ms[1:]), 2),
    }


class _Gateway:
    """One connection to the gateway; a call generates an image and returns seconds."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
        self.outside_ms = 0.0

    def __enter__(self) -> _Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def __call__(self, request: GenerationRequest) -> float:
        body = {
            "prompt": request.prompt,
            "size": f"{request.width}x{request.height}",
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "seed": request.seed,
        }
        content = json.dumps(body)
        began = time.perf_counter()
        self._connection.request("POST", "/v1/images/generations", content, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        seconds = time.perf_counter() - began
        if response.status != http.client.OK:
            raise ToolError(f"the gateway answered {response.status}: {answer[:300]!r}")
        phases = re.findall(r"dur=([0-9.]+)", response.headers["Server-Timing"])
        self.outside_ms = float(response.headers["openai-processing-ms"]) - sum(map(float, phases[:4]))
        return seconds


class _Triton:
    """One gRPC stream to Triton; a call generates an image and returns seconds."""

    def __init__(self, server: Server) -> None:
        self._client = InferenceServerClient(server.said(r"gRPC on (\S+:\d+)"))
        self._answers: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> _Triton:
        self._client.start_stream(lambda result, error: self._answers.put(error or result))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def __call__(self, request: GenerationRequest) -> float:
        values = asdict(request)
        names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        began = time.perf_counter()
        tensors = [tensor(names.get(name, name), value) for name, value in values.items()]
        self._client.async_stream_infer("diffusion", tensors)
        answer = self._answers.get(timeout=120)
        if isinstance(answer, Exception):
            raise ToolError(f"Triton answered: {answer}")
        answer.as_numpy("image")
        return time.perf_counter() - began
