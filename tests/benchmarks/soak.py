"""A server under mixed load for twenty minutes: does anything grow?

    python tests/benchmarks/soak.py                  the shipped model, 20 minutes, two requests in flight
    python tests/benchmarks/soak.py --minutes 5 --in-flight 8

The load comes in rounds. When all requests of a round have ended, it samples each process of the server: memory (its
share of what is no file, as pages of libraries are shared with whatever else runs), threads, file handles and sockets;
beside them /dev/shm, temporary files and the tasks of the gateway's event loop. Memory may rise while pools and caches
fill; what still rises in the second half is a leak. The verdict is the Theil-Sen slope there, the median of the slopes
of all pairs of samples, which a few spikes do not move. The report is build/soak/report.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import httpx
import matplotlib as mpl
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.mixed_load import Outcomes, drive, touch_every_shape
from support.running_server import Server, samples_of, start_server, stop_server

mpl.use("Agg")
from matplotlib import pyplot as plt

BUILD = Path(__file__).parents[2] / "build"
# Of a process, per hour: what a day would add must not matter on a machine that serves the model.
MEMORY_LIMIT = 24.0  # MiB
# Of anything that is counted: one more in half an hour might be chance, three in an hour are not.
COUNT_LIMIT = 3.0
MIB = 1 << 20
ROUNDS = 120
# Connections that were cut are noticed by then, and what hung on them has ended.
SETTLE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Something that must not grow: its unit, and how much of it per hour is noise."""

    unit: str
    limit: float


KINDS: Mapping[str, Kind] = {
    "memory": Kind(unit="MiB", limit=MEMORY_LIMIT),
    "threads": Kind(unit="", limit=COUNT_LIMIT),
    "handles": Kind(unit="", limit=COUNT_LIMIT),
    "sockets": Kind(unit="", limit=COUNT_LIMIT),
    "shared memory": Kind(unit="MiB", limit=MEMORY_LIMIT),
    "temporary files": Kind(unit="", limit=COUNT_LIMIT),
    "tasks": Kind(unit="", limit=COUNT_LIMIT),
}


@dataclass
class Series:
    """One thing over time: seconds since the start, and its values."""

    kind: str
    name: str
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def slope(self) -> float:
        """Of the second half, per hour."""
        half = len(self.times) // 2
        return theil_sen(self.times[half:], self.values[half:]) * 3600

    @property
    def growth(self) -> float:
        """Over the second half, in its unit."""
        half = len(self.times) // 2
        return self.slope * (self.times[-1] - self.times[half]) / 3600

    @property
    def grows(self) -> bool:
        """Whether it rises faster than noise would."""
        return self.slope > KINDS[self.kind].limit


def theil_sen(times: Sequence[float], values: Sequence[float]) -> float:
    """The median slope over all pairs of points; 0 where there are fewer than two."""
    points = list(zip(times, values, strict=True))
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for number, earlier in enumerate(points)
        for later in points[number + 1 :]
    ]
    return statistics.median(slopes) if slopes else 0.0


class Samples:
    """What a server holds, over time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._began = time.monotonic()
        self._series: dict[tuple[str, str], Series] = {}

    def take(self) -> None:
        """One more sample of everything."""
        seconds = time.monotonic() - self._began
        for (kind, name), value in self._now().items():
            series = self._series.setdefault((kind, name), Series(kind, name))
            series.times.append(seconds)
            series.values.append(value)

    @property
    def series(self) -> list[Series]:
        """By kind and name."""
        return [self._series[key] for key in sorted(self._series)]

    def _now(self) -> dict[tuple[str, str], float]:
        values: dict[tuple[str, str], float] = {}
        gateway = psutil.Process(self._server.process.pid)
        for process in (gateway, *gateway.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                values |= _of_process(process, "gateway" if process == gateway else _name_of(process))
        values["shared memory", "/dev/shm"] = shared_memory(gateway.pid) / MIB
        values["temporary files", "temporary folder"] = temporary_files(gateway.pid)
        values |= {("tasks", name): value for name, value in self._said_by_gateway().items()}
        return values

    def _said_by_gateway(self) -> dict[str, float]:
        said = samples_of(httpx.get(f"{self._server.url}/metrics", timeout=30).text, "hypergen_gateway_")
        return {name: said[name] for name in ("asyncio_tasks",)}


def _of_process(process: psutil.Process, name: str) -> dict[tuple[str, str], float]:
    with process.oneshot():
        return {
            ("memory", name): _anonymous_memory(process.pid) / MIB,
            ("threads", name): process.num_threads(),
            ("handles", name): process.num_fds(),
            ("sockets", name): len(process.net_connections("all")),
        }


def _anonymous_memory(pid: int) -> int:
    """Bytes, swapped ones included; what several processes share is divided among them."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kibibytes = {words[0]: int(words[1]) for words in lines}
    return 1024 * sum(kibibytes[name] for name in ("Pss_Anon:", "Pss_Shmem:", "SwapPss:"))


def _name_of(process: psutil.Process) -> str:
    """A stub is named by its model, whose file is its first argument."""
    if process.name().startswith("triton_python"):
        return Path(process.cmdline()[1]).parents[1].name
    return process.name()


def shared_memory(gateway: int) -> int:
    """Bytes in /dev/shm of the Triton that this gateway started."""
    regions = Path("/dev/shm").glob(f"hypergen-triton-{gateway}-*")
    return sum(region.stat().st_blocks * 512 for region in regions)


def temporary_files(gateway: int) -> int:
    """Files that the server keeps in the temporary folder."""
    folders = Path(tempfile.gettempdir()).glob(f"hypergen-triton-{gateway}-*")
    return sum(1 for folder in folders for _ in folder.rglob("*"))


async def soak(server: Server, seconds: float, in_flight: int) -> tuple[list[Series], Outcomes]:
    """Load the server round by round, and see after each what it holds."""
    outcomes, samples, chance = Outcomes(), Samples(server), random.Random(0)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        await drive(server, max(seconds / ROUNDS, 2 * SETTLE_SECONDS), in_flight, chance, outcomes)
        await asyncio.sleep(SETTLE_SECONDS)
        await asyncio.to_thread(samples.take)
    return samples.series, outcomes


def table(series: Sequence[Series]) -> str:
    """One row for each thing that was watched."""
    rows = [
        f"| {each.kind} | {each.name} | {each.values[0]:.1f} | {each.values[-1]:.1f} {KINDS[each.kind].unit} "
        f"| {each.slope:+.1f} | {KINDS[each.kind].limit:g} | {'**grows**' if each.grows else 'flat'} |"
        for each in series
    ]
    head = [
        "| what | of | first | last | slope of the second half, per hour | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def verdict(series: Sequence[Series], outcomes: Outcomes) -> str:
    """In one line."""
    growing = [f"{each.kind} of {each.name}" for each in series if each.grows]
    held = f"{', '.join(growing)} grew" if growing else "nothing grew"
    return f"{outcomes.total} requests, {len(outcomes.lost)} lost; {held}"


def write_report(folder: Path, title: str, series: Sequence[Series], outcomes: Outcomes) -> Path:
    """Verdict, what was asked, table and plot; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    _plot(folder / "soak.png", series)
    (folder / "samples.json").write_text(json.dumps([asdict(each) for each in series]))
    asked = "\n".join(f"- {count} × {what}" for what, count in sorted(Counter(outcomes.counts).items()))
    lost = "\n".join(f"- lost: {what}" for what in outcomes.lost[:20])
    sections = [f"# {title}", verdict(series, outcomes), asked, lost, table(series), "![](soak.png)"]
    report = folder / "report.md"
    report.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return report


def _plot(path: Path, series: Sequence[Series]) -> None:
    kinds = [kind for kind in KINDS if any(each.kind == kind for each in series)]
    figure, axes = plt.subplots((len(kinds) + 1) // 2, 2, figsize=(11, 9), layout="constrained")
    for axis in axes.flat[len(kinds) :]:
        axis.remove()
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for each in (each for each in series if each.kind == kind):
            axis.plot([seconds / 60 for seconds in each.times], each.values, label=each.name, linewidth=1)
        axis.set(title=kind, ylabel=KINDS[kind].unit, ylim=(0, None), xlabel="minutes")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Start the server, load it, write the report; the exit code says whether it holds."""
    parser = argparse.ArgumentParser(description="Twenty minutes of mixed load: does anything grow?")
    parser.add_argument("--minutes", type=float, default=20.0, help="[default: 20]")
    parser.add_argument("--in-flight", type=int, default=2, help="requests at a time  [default: 2]")
    parser.add_argument("--model", default="hypergen/emoji", help="[default: the shipped one]")
    options = parser.parse_args()
    server = start_server("--max-queue-size", "4", "--link-lifetime", "60", model=options.model)
    try:
        asyncio.run(touch_every_shape(server))
        series, outcomes = asyncio.run(soak(server, options.minutes * 60, options.in_flight))
    finally:
        stop_server(server)
    title = (
        f"{options.minutes:g} minutes of mixed load on {options.model}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    )
    print(f"{write_report(BUILD / 'soak', title, series, outcomes)}\n\n{table(series)}\n\n{verdict(series, outcomes)}")
    if outcomes.lost or any(each.grows for each in series):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
