"""Shared by all measures: the bench, and alternating runs in which two targets get the same requests."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.figures import Figures, Pairs, Results
from benchmarks.peers import Environment, Peer
from benchmarks.targets import GenerationRequest, Target
from benchmarks.workloads import Workload

# Pairs that take longer print a line of progress.
TOLD_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is measured: pairs of single images per checkpoint, and rounds of longer measures.

    After `seconds` no further pair is begun.
    """

    pairs: int
    large_pairs: int
    rounds: int
    seconds: float = 150
    levels: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark run: its environment, results and budget; `peers` are the names of the peers to measure."""

    environment: Environment
    results: Results
    budget: Budget
    peers: Sequence[str]
    began: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        """Progress, on standard error."""
        print(f"[{time.monotonic() - self.began:5,.0f} s] {what}", file=sys.stderr, flush=True)

    def enter(self, figures: Figures) -> None:
        """Record the figures and print the first of them."""
        self.results.enter(figures)
        name, value = next(iter(figures.items()))
        self.say(f"{name}: {value}")

    def fail(self, name: str, error: Exception | str) -> None:
        """Record and print why there is no figure of that name."""
        self.results.fail(name, str(error))
        self.say(f"{name}: {error}")

    @asynccontextmanager
    async def running(self, peer: Peer, workload: Workload) -> AsyncIterator[Any]:
        """The peer's target, started for the context and stopped afterwards. Raises ToolError."""
        self.say(f"{workload.name}: starting {peer.name}")
        target = await peer.start(self.environment, workload)
        try:
            yield target
        finally:
            await target.stop()


async def take_turns(
    bench: Bench, ours: Target, theirs: Target, requests: Iterator[GenerationRequest], count: int
) -> Pairs:
    """Send each request to both targets, one right after the other, in alternating order.

    An image of one step warms each up. There are fewer than `count` pairs if they exceed the budget's seconds.
    """
    for target in (ours, theirs):
        await target.generate(replace(next(requests), steps=1))
    taken: dict[str, list[float]] = {ours.name: [], theirs.name: []}
    until = time.monotonic() + bench.budget.seconds
    for number in range(1, count + 1):
        request = next(requests)
        for target in (ours, theirs) if number % 2 else (theirs, ours):
            taken[target.name].append(await target.generate(request))
        if taken[ours.name][-1] + taken[theirs.name][-1] > TOLD_SECONDS:
            told = ", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in taken.items())
            bench.say(f"  pair {number} of {count}: {told}")
        if time.monotonic() > until:
            break
    return Pairs(taken[ours.name], taken[theirs.name])


async def in_flight(target: Target, requests: Iterator[GenerationRequest], number: int, count: int) -> float:
    """Images per second while `number` requests are in flight, until `count` are done."""
    left = [next(requests) for _ in range(count)]

    async def generate_next() -> None:
        while left:
            await target.generate(left.pop(0))

    began = time.perf_counter()
    tasks = [asyncio.create_task(generate_next()) for _ in range(number)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return count / (time.perf_counter() - began)
