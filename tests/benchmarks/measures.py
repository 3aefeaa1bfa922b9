"""What is measured, part by part: each pits ours against others in turns and enters what came of it in the book.

Ours stays up for a part, and one other beside it, idle while ours draws. A part that fails is an entry that says why.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders import Contender, Wish, memory
from benchmarks.environments import ToolError
from benchmarks.figures import Book, Pairs, latency_figures
from benchmarks.peers import OURS, PEERS, Ground, Peer, running
from benchmarks.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    pairs: int
    """Of single pictures with the shipped model."""
    large_pairs: int
    """The same with the full-size one."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    ground: Ground
    book: Book
    effort: Effort
    peers: Sequence[str]
    began: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        """Progress, on standard error."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {what}", file=sys.stderr, flush=True)

    def chosen(self, subject: Subject) -> Iterator[Peer]:
        """The peers that take part with this checkpoint; why another cannot is entered in the book."""
        for name in self.peers:
            peer = PEERS[name]
            if subject.name in peer.subjects:
                yield peer
            else:
                self.book.fail(f"{name}_over_ours_one_picture_{subject.name}", peer.why_not)


async def take_turns(ours: Contender, theirs: Contender, wishes: Iterator[Wish], count: int) -> Pairs:
    """Each wish to both, one right after the other; who comes first changes. The first wish only warms up."""
    taken: dict[str, list[float]] = {ours.name: [], theirs.name: []}
    for number in range(count + 1):
        wish = next(wishes)
        for contender in (ours, theirs) if number % 2 else (theirs, ours):
            taken[contender.name].append(await contender.draw(wish))
    return Pairs(taken[ours.name][1:], taken[theirs.name][1:])


async def pictures(bench: Bench, subject: Subject) -> None:
    """One picture at a time: ours against every peer, and what memory each holds afterwards."""
    count = bench.effort.pairs if subject.name == "shipped" else bench.effort.large_pairs
    async with running(OURS, bench.ground, subject) as ours:
        for peer in bench.chosen(subject):
            name = f"{peer.name}_over_ours_one_picture_{subject.name}"
            try:
                async with running(peer, bench.ground, subject) as theirs:
                    pairs = await take_turns(ours, theirs, subject.wishes(), count)
                    bench.book.enter(latency_figures(name, peer.name, pairs))
                    _enter_memory(bench, subject, peer.name, theirs)
                    bench.say(_told(name, peer.name, bench.book.figures))
            except ToolError as error:
                bench.book.fail(name, str(error))
                bench.say(f"{name}: {error}")
        _enter_memory(bench, subject, "ours", ours)


def _enter_memory(bench: Bench, subject: Subject, name: str, contender: Contender) -> None:
    resident, proportional = memory(contender.process)
    bench.book.enter(
        {
            f"memory_{subject.name}_{name}_resident_mb": round(resident / 1e6),
            f"memory_{subject.name}_{name}_proportional_mb": round(proportional / 1e6),
        }
    )


def _told(name: str, peer: str, figures: dict[str, Any]) -> str:
    ours, theirs = figures[f"{name}_ours_median_ms"], figures[f"{name}_{peer}_median_ms"]
    spread = f"{figures[f'{name}_lowest']:.2f} to {figures[f'{name}_highest']:.2f}"
    return f"{name}: {figures[name]:.3f} ({spread}); ours {ours:,.0f} ms, {peer} {theirs:,.0f} ms"
