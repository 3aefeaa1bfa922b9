"""A server under load by NVIDIA's own tools, with a report in Markdown: images per second and latency, and plots.

    python tests/benchmarks/under_load.py diffusion     perf_analyzer on the model in Triton, over gRPC, and its UNet
    python tests/benchmarks/under_load.py gateway       perf_analyzer on POST /v1/images/generations
    python tests/benchmarks/under_load.py aiperf        aiperf on the same route; 1.2 GB to install

Without --url it starts `hypergen serve` with the shipped model, and stops it at the end. Each tool installs itself into
build/; perf_analyzer also needs Debian's package libb64-0d. The report is build/load/NAME/report.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import httpx
import matplotlib as mpl

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import BUILD, ToolError, install
from benchmarks.load_tools import TOOLS, Address, Level, Tool
from support.running_server import start_server, stop_server

mpl.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Install the tool, load the server level by level, write the report."""
    options = _options()
    tool = TOOLS[options.what]
    try:
        install(BUILD / tool.name, tool.packages)
        with _address(tool, options) as address:
            levels = [_measure(tool, address, in_flight, options) for in_flight in options.in_flight]
    except ToolError as error:
        raise SystemExit(str(error)) from error
    report = write_report(BUILD / "load" / options.what, address, levels)
    print(f"{report}\n\n{table(levels)}")


def _measure(tool: Tool, address: Address, in_flight: int, options: argparse.Namespace) -> Level:
    """The load at one level: at least as many requests as make each of those in flight a few times."""
    folder = BUILD / "load" / options.what / f"{in_flight}-in-flight"
    folder.mkdir(parents=True, exist_ok=True)
    requests = max(options.requests, 2 * in_flight)
    print(f"{options.what}: {requests} requests, {in_flight} in flight", file=sys.stderr)
    return tool.load(address, in_flight, requests, folder)


@contextlib.contextmanager
def _address(tool: Tool, options: argparse.Namespace) -> Iterator[Address]:
    """Where the load goes: what was named, or a server of our own for as long as it takes."""
    if options.url:
        model = "diffusion" if tool.grpc else _model_id(options.url, options.api_key)
        yield Address(url=options.url, model=model, key=options.api_key)
        return
    print("Starting the shipped model", file=sys.stderr)
    server = start_server(model="hypergen/emoji", key=None)
    try:
        yield Address(url=server.triton_url if tool.grpc else server.url, model="hypergen/emoji", key=None)
    finally:
        stop_server(server)


def _model_id(url: str, key: str | None) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise ToolError(f"{url} does not answer: {error}") from error
    if answer.status_code != httpx.codes.OK:
        raise ToolError(f"{url}/v1/models answers {answer.status_code}")
    model: str = answer.json()["data"][0]["id"]
    return model


def table(levels: Sequence[Level]) -> str:
    """One row per level."""
    rows = [
        f"| {level.in_flight} | {len(level.spans)} | {level.per_second:.2f} "
        f"| {level.median * 1e3:,.0f} ms | {level.p95 * 1e3:,.0f} ms |"
        for level in levels
    ]
    return "\n".join(["| in flight | requests | images/s | median | p95 |", "|---|---|---|---|---|", *rows])


def write_report(folder: Path, address: Address, levels: Sequence[Level]) -> Path:
    """Table, plots and the tool's own words, level by level; returns the file."""
    _plot(folder / "load.png", levels)
    said = [f"## {level.in_flight} in flight\n\n```\n{level.said.strip()}\n```" for level in levels]
    sections = [f"# {folder.name} under load", _circumstances(address), table(levels), "![](load.png)", *said]
    report = folder / "report.md"
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return report


def _circumstances(address: Address) -> str:
    load, _, _ = os.getloadavg()
    return (
        f"Model `{address.model}` at {address.url}; {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), on which {load:.1f} processes wanted to run at the end."
    )


def _plot(path: Path, levels: Sequence[Level]) -> None:
    in_flight = [level.in_flight for level in levels]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(in_flight, [level.per_second for level in levels], marker="o")
    left.set(ylabel="images per second", title="Throughput")
    for name, seconds in (("median", [x.median for x in levels]), ("p95", [x.p95 for x in levels])):
        right.plot(in_flight, seconds, marker="o", label=name)
    right.set(ylabel="seconds", title="Latency")
    right.legend()
    for axes in (left, right):
        axes.set(xlabel="requests in flight", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(in_flight, labels=[str(number) for number in in_flight])
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A server under load by perf_analyzer or aiperf.")
    parser.add_argument("what", choices=sorted(TOOLS))
    parser.add_argument("--url", help="http://HOST:PORT of a gateway, or for diffusion HOST:PORT of a Triton's gRPC")
    parser.add_argument("--api-key", default=os.environ.get("HYPERGEN_API_KEY"), help="[default: $HYPERGEN_API_KEY]")
    parser.add_argument("--requests", type=int, default=20, help="at each level  [default: 20]")
    parser.add_argument("--in-flight", type=_numbers, default=[1, 2, 4, 8], help="levels  [default: 1,2,4,8]")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
