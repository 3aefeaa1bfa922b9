"""What all measures share: the bench they run on, and turns, in which ours and another get the same wishes."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.contenders import GenerationRequest, Target
from benchmarks.figures import Figures, Pairs, Results
from benchmarks.peers import Environment, Peer
from benchmarks.subjects import Workload

# A pair that takes longer is worth a line of progress.
TOLD_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is measured: pairs of single pictures of each checkpoint, rounds of whatever takes longer.

    After `seconds` no further pair is begun.
    """

    pairs: int
    large_pairs: int
    rounds: int
    seconds: float = 150
    levels: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where figures go and how many are wanted; `peers` are the names of those that take part."""

    ground: Environment
    book: Results
    effort: Budget
    peers: Sequence[str]
    began: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        """Progress, on standard error."""
        print(f"[{time.monotonic() - self.began:5,.0f} s] {what}", file=sys.stderr, flush=True)

    def enter(self, figures: Figures) -> None:
        """Keep the figures and show the first of them."""
        self.book.enter(figures)
        name, value = next(iter(figures.items()))
        self.say(f"{name}: {value}")

    def fail(self, name: str, error: Exception | str) -> None:
        """Keep why there is no figure of that name, and show it."""
        self.book.fail(name, str(error))
        self.say(f"{name}: {error}")

    @asynccontextmanager
    async def running(self, peer: Peer, subject: Workload) -> AsyncIterator[Any]:
        """The contender for as long as it is needed. Raises ToolError."""
        self.say(f"{subject.name}: starting {peer.name}")
        contender = await peer.start(self.ground, subject)
        try:
            yield contender
        finally:
            await contender.stop()


async def take_turns(
    bench: Bench, ours: Target, theirs: Target, wishes: Iterator[GenerationRequest], count: int
) -> Pairs:
    """Each wish to both, one right after the other; who comes first changes.

    First a picture of one step, to warm up. Fewer pairs than `count` where they take long.
    """
    for contender in (ours, theirs):
        await contender.draw(replace(next(wishes), steps=1))
    taken: dict[str, list[float]] = {ours.name: [], theirs.name: []}
    until = time.monotonic() + bench.effort.seconds
    for number in range(1, count + 1):
        wish = next(wishes)
        for contender in (ours, theirs) if number % 2 else (theirs, ours):
            taken[contender.name].append(await contender.draw(wish))
        if taken[ours.name][-1] + taken[theirs.name][-1] > TOLD_SECONDS:
            told = ", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in taken.items())
            bench.say(f"  pair {number} of {count}: {told}")
        if time.monotonic() > until:
            break
    return Pairs(taken[ours.name], taken[theirs.name])


async def in_flight(contender: Target, wishes: Iterator[GenerationRequest], number: int, count: int) -> float:
    """Pictures per second while `number` requests are in flight, until `count` are done."""
    left = [next(wishes) for _ in range(count)]

    async def draw_on() -> None:
        while left:
            await contender.draw(left.pop(0))

    began = time.perf_counter()
    tasks = [asyncio.create_task(draw_on()) for _ in range(number)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return count / (time.perf_counter() - began)
