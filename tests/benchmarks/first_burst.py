"""Bursts of eight requests from the moment a server is ready: p95 of each burst, start-up time and the models' memory.

    python tests/benchmarks/first_burst.py [--pause SECONDS] [HYPERGEN …]

HYPERGEN are `hypergen` commands to compare, in alternation; the default is this checkout's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.running_server as running_server
from benchmarks.figures import percentile
from support.running_server import Server, generate, processes, start_server, stop_server

AT_ONCE, BURSTS = 8, 3


def main() -> None:
    """Start each server in turn, send it bursts and print its figures."""
    options = _options()
    for command in options.hypergen * options.rounds:
        running_server.HYPERGEN = command
        began = time.monotonic()
        server = start_server(model="hypergen/emoji", key=None)
        ready = time.monotonic() - began
        try:
            time.sleep(options.pause)
            bursts = [asyncio.run(_burst(server)) for _ in range(BURSTS)]
            p95 = ", ".join(f"{percentile(seconds, 0.95):.2f}" for seconds in bursts)
            print(
                f"{command}: ready after {ready:.1f} s; p95 {p95} s; models hold {_mebibytes(server)} MiB", flush=True
            )
        finally:
            stop_server(server)


async def _burst(server: Server) -> list[float]:
    async with server.async_client() as client:

        async def one(seed: int) -> float:
            began = time.monotonic()
            await generate(client, prompt="a rocket", seed=seed)
            return time.monotonic() - began

        return list(await asyncio.gather(*(one(seed) for seed in range(AT_ONCE))))


def _mebibytes(server: Server) -> int:
    models: list[psutil.Process] = processes(server, "triton_python")
    return int(sum(model.memory_info().rss for model in models) / 2**20)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The first burst of requests after a start.")
    parser.add_argument("hypergen", nargs="*", default=[running_server.HYPERGEN])
    parser.add_argument("--rounds", type=int, default=3, help="times that each command is started")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between ready and the first burst")
    return parser.parse_args()


if __name__ == "__main__":
    main()
