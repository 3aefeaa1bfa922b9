"""One image at a time: against every peer, with idle cores or a busy one, and by steps and size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.environments import ToolError
from benchmarks.figures import Figures, latency_figures
from benchmarks.measures.turns import Bench, take_turns
from benchmarks.peers import FLOOR, HYPERGEN, OURS, PEERS
from benchmarks.targets import GenerationRequest, Target, memory
from benchmarks.workloads import Workload

STEPS = (1, 5, 10, 20, 50)
# The busy loop ends by itself after this long.
BUSY_SECONDS = 1200
STALLED_SECONDS = 200.0


async def one_image(bench: Bench, workload: Workload) -> None:
    """Latency against each peer in alternation, and the memory of each afterwards."""
    async with bench.running(OURS, workload) as ours:
        for name in bench.peers:
            peer = PEERS[name]
            entry = f"{name}_over_ours_one_image_{workload.name}"
            if workload.name not in peer.checkpoints:
                bench.fail(entry, peer.why_not)
                continue
            try:
                async with bench.running(peer, workload) as theirs:
                    pairs = await take_turns(bench, ours, theirs, workload.requests(), _pairs(bench, workload))
                    bench.enter(latency_figures(entry, name, pairs) | _memory(workload, name, theirs))
            except ToolError as error:
                bench.fail(entry, error)
        bench.enter(_memory(workload, "ours", ours))
    _enter_lower(bench, "openvino_genai_over_ours_one_image")


def _enter_lower(bench: Bench, name: str) -> None:
    """The worse ratio of a peer that was measured with both checkpoints."""
    both = [bench.results.figures.get(f"{name}_{workload}") for workload in ("shipped", "sd15")]
    if measured := [ratio for ratio in both if isinstance(ratio, float)]:
        bench.enter({name: min(measured)})


def _pairs(bench: Bench, workload: Workload) -> int:
    return bench.budget.large_pairs if workload.name == "sd15" else bench.budget.pairs


def _memory(workload: Workload, name: str, target: Target) -> Figures:
    resident, proportional = memory(target.process)
    return {
        f"memory_{workload.name}_{name}_proportional_mb": round(proportional / 1e6),
        f"memory_{workload.name}_{name}_resident_mb": round(resident / 1e6),
    }


async def one_core_busy(bench: Bench, workload: Workload) -> None:
    """Latency against HyperGen 0.1 while another program keeps one core busy.

    Threads that wait for each other may then stall for minutes. HyperGen is not waited for longer than a limit, which
    then counts as its time, so that the ratio is the least that it can be. The large model takes one step.
    """
    entry = f"hypergen_over_ours_one_image_{workload.name}_one_core_busy"
    is_large = workload.name == "sd15"
    requests, count = workload.requests(steps=1 if is_large else None), 1 if is_large else 2 * bench.budget.rounds
    try:
        async with bench.running(OURS, workload) as ours, bench.running(HYPERGEN, workload) as theirs:
            with _busy_core():
                pairs = await take_turns(bench, ours, _Bounded(theirs), requests, count)
        bench.enter(latency_figures(entry, "hypergen", pairs))
    except ToolError as error:
        bench.fail(entry, error)


class _Bounded:
    """A target with a time limit; an image that exceeds it counts as having taken that long."""

    def __init__(self, target: Target) -> None:
        self.name = target.name
        self.process = target.process
        self.stop = target.stop
        self._generate = target.generate

    async def generate(self, request: GenerationRequest) -> float:
        try:
            return await asyncio.wait_for(self._generate(request), STALLED_SECONDS)
        except asyncio.TimeoutError:
            return STALLED_SECONDS


@contextlib.contextmanager
def _busy_core() -> Iterator[None]:
    core = max(os.sched_getaffinity(0))
    program = (
        f"import os, time; os.sched_setaffinity(0, {{{core}}}); end = time.monotonic() + {BUSY_SECONDS}\n"
        "while time.monotonic() < end: pass"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def growth(bench: Bench, workload: Workload) -> None:
    """Latency by number of steps and by size, of this server, the floor and HyperGen 0.1 in alternation."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            targets = {
                peer.name: await stack.enter_async_context(bench.running(peer, workload))
                for peer in (OURS, FLOOR, HYPERGEN)
            }
            for steps in STEPS:
                await _grow(bench, workload, targets, f"{steps}_steps", replace(workload.request, steps=steps))
            for size in workload.sizes:
                await _grow(
                    bench, workload, targets, f"{size}_pixels", replace(workload.request, width=size, height=size)
                )
    except ToolError as error:
        bench.fail(f"growth_{workload.name}", error)


async def _grow(
    bench: Bench, workload: Workload, targets: dict[str, Target], what: str, request: GenerationRequest
) -> None:
    """The first round warms up."""
    requests = workload.requests(request.steps, request.width)
    taken: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(bench.budget.rounds + 1):
        each = next(requests)
        for name, target in targets.items():
            taken[name].append(await target.generate(each))
    bench.enter(
        {
            f"growth_{workload.name}_{what}_{name}_ms": round(statistics.median(seconds[1:]) * 1e3, 2)
            for name, seconds in taken.items()
        }
    )
