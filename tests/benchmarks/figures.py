"""The arithmetic of comparisons, and the one flat object that all figures are kept in.

A comparison is made of pairs: both sides had the same request, one right after the other. What counts is the median
of the pairs' ratios, since whatever else the machine does meets both sides of a pair alike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Figure = float | int | str
Figures = dict[str, Figure]


@dataclass(frozen=True)
class Pairs:
    """What each side took for the same requests, in order; in seconds, or whatever unit both share."""

    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Theirs ÷ ours: above 1 where ours took less."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def inverse(self) -> float:
        """Ours ÷ theirs, for what is better the more there is of it."""
        return statistics.median(1 / ratio for ratio in self.ratios)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def latency_figures(name: str, peer: str, pairs: Pairs) -> Figures:
    """The ratio as `name`, and under names that begin so what it came from, in milliseconds."""
    figures: Figures = {name: round(pairs.ratio, 3), f"{name}_pairs": len(pairs.ours)}
    figures |= {f"{name}_lowest": round(min(pairs.ratios), 3), f"{name}_highest": round(max(pairs.ratios), 3)}
    for side, seconds in (("ours", pairs.ours), (peer, pairs.theirs)):
        figures[f"{name}_{side}_median_ms"] = round(statistics.median(seconds) * 1e3, 2)
        figures[f"{name}_{side}_p95_ms"] = round(percentile(seconds, 0.95) * 1e3, 2)
    return figures


def rate_figures(name: str, peer: str, pairs: Pairs) -> Figures:
    """Ours ÷ theirs as `name`, and the median rates of both, per second."""
    inverted = [1 / ratio for ratio in pairs.ratios]
    return {
        name: round(pairs.inverse, 3),
        f"{name}_pairs": len(pairs.ours),
        f"{name}_lowest": round(min(inverted), 3),
        f"{name}_highest": round(max(inverted), 3),
        f"{name}_ours_per_second": round(statistics.median(pairs.ours), 3),
        f"{name}_{peer}_per_second": round(statistics.median(pairs.theirs), 3),
    }


class Results:
    """The figures on disk: one flat object, written anew with each entry, so that a run cut short leaves what it has.

    Earlier entries stay until they are measured again: a run of some parts completes another's.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.figures: Figures = json.loads(file.read_text()) if file.exists() else {}

    def enter(self, figures: Figures) -> None:
        """Put figures in, and out whatever earlier reason there was for having none."""
        for name, value in figures.items():
            self.figures.pop(f"{name}_failed", None)
            self.figures[name] = value
        self._write()

    def fail(self, name: str, reason: str) -> None:
        """Say why there is no figure of that name."""
        for entry in [entry for entry in self.figures if entry == name or entry.startswith(f"{name}_")]:
            del self.figures[entry]
        self.figures[f"{name}_failed"] = reason
        self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=1, sort_keys=True) + "\n")
        partial.replace(self.file)
