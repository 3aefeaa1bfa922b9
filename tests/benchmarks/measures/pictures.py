"""One picture at a time: ours against every peer, with idle cores and a busy one, and how the time grows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.contenders import GenerationRequest, Target, memory
from benchmarks.environments import ToolError
from benchmarks.figures import Figures, latency_figures
from benchmarks.measures.turns import Bench, take_turns
from benchmarks.peers import FLOOR, HYPERGEN, OURS, PEERS
from benchmarks.subjects import Workload

STEPS = (1, 5, 10, 20, 50)
# The program that keeps a core busy ends by itself after this long.
BUSY_SECONDS = 1200
STALLED_SECONDS = 200.0


async def one_picture(bench: Bench, subject: Workload) -> None:
    """Ours and each peer in turns, and what memory each holds afterwards."""
    async with bench.running(OURS, subject) as ours:
        for name in bench.peers:
            peer = PEERS[name]
            entry = f"{name}_over_ours_one_picture_{subject.name}"
            if subject.name not in peer.subjects:
                bench.fail(entry, peer.why_not)
                continue
            try:
                async with bench.running(peer, subject) as theirs:
                    pairs = await take_turns(bench, ours, theirs, subject.wishes(), _pairs(bench, subject))
                    bench.enter(latency_figures(entry, name, pairs) | _memory(subject, name, theirs))
            except ToolError as error:
                bench.fail(entry, error)
        bench.enter(_memory(subject, "ours", ours))
    _enter_lower(bench, "openvino_genai_over_ours_one_picture")


def _enter_lower(bench: Bench, name: str) -> None:
    """Of a peer that has both checkpoints, the ratio that is the worse for us."""
    both = [bench.book.figures.get(f"{name}_{subject}") for subject in ("shipped", "sd15")]
    if measured := [ratio for ratio in both if isinstance(ratio, float)]:
        bench.enter({name: min(measured)})


def _pairs(bench: Bench, subject: Workload) -> int:
    return bench.effort.large_pairs if subject.name == "sd15" else bench.effort.pairs


def _memory(subject: Workload, name: str, contender: Target) -> Figures:
    resident, proportional = memory(contender.process)
    return {
        f"memory_{subject.name}_{name}_proportional_mb": round(proportional / 1e6),
        f"memory_{subject.name}_{name}_resident_mb": round(resident / 1e6),
    }


async def one_core_busy(bench: Bench, subject: Workload) -> None:
    """Ours and HyperGen in turns while another program computes on one core without a pause.

    Threads that wait for each other may then stall for minutes. HyperGen is not waited for longer than a limit, which
    then counts as its time, so that the ratio is the least that it can be. The large model takes one step.
    """
    entry = f"hypergen_over_ours_one_picture_{subject.name}_one_core_busy"
    is_large = subject.name == "sd15"
    wishes, count = subject.wishes(steps=1 if is_large else None), 1 if is_large else 2 * bench.effort.rounds
    try:
        async with bench.running(OURS, subject) as ours, bench.running(HYPERGEN, subject) as theirs:
            with _busy_core():
                pairs = await take_turns(bench, ours, _Bounded(theirs), wishes, count)
        bench.enter(latency_figures(entry, "hypergen", pairs))
    except ToolError as error:
        bench.fail(entry, error)


class _Bounded:
    """A contender that is waited for so long and no longer, which then counts as what it took."""

    def __init__(self, contender: Target) -> None:
        self.name = contender.name
        self.process = contender.process
        self.stop = contender.stop
        self._draw = contender.draw

    async def draw(self, wish: GenerationRequest) -> float:
        try:
            return await asyncio.wait_for(self._draw(wish), STALLED_SECONDS)
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


async def growth(bench: Bench, subject: Workload) -> None:
    """How one picture's time grows with its steps and its size: ours, the floor and HyperGen in turns."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            contenders = {
                peer.name: await stack.enter_async_context(bench.running(peer, subject))
                for peer in (OURS, FLOOR, HYPERGEN)
            }
            for steps in STEPS:
                await _grow(bench, subject, contenders, f"{steps}_steps", replace(subject.wish, steps=steps))
            for size in subject.sizes:
                await _grow(
                    bench, subject, contenders, f"{size}_pixels", replace(subject.wish, width=size, height=size)
                )
    except ToolError as error:
        bench.fail(f"growth_{subject.name}", error)


async def _grow(
    bench: Bench, subject: Workload, contenders: dict[str, Target], what: str, wish: GenerationRequest
) -> None:
    """The first round warms up."""
    wishes = subject.wishes(wish.steps, wish.width)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(bench.effort.rounds + 1):
        each = next(wishes)
        for name, contender in contenders.items():
            taken[name].append(await contender.draw(each))
    bench.enter(
        {
            f"growth_{subject.name}_{what}_{name}_ms": round(statistics.median(seconds[1:]) * 1e3, 2)
            for name, seconds in taken.items()
        }
    )
