"""What LoRAs cost on the shipped model: eight images with four of them beside eight without, and a file that comes.

A command, not a test. Two servers take turns, one with a rank pool and one that has none; then a file is dropped into
the folder of the first, while it generates four images at a time:

    python tests/benchmarks/lora_cost.py [--dtype float32] [--steps 20] [--runs 15]
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import ROOT
from support.running_server import Server, generate, start_server, stop_server

BADGE = ROOT / "export" / "emoji" / "loras" / "badge.safetensors"
# Each is the same file, but has columns of its own.
NAMES = ("one", "two", "three", "four")
COMING = "five"
COLUMNS = 64
IMAGES = 8
IN_FLIGHT = 4
LONGEST_WAIT = 120.0
SECONDS_BEFORE = 5.0


def main() -> None:
    """Print both costs."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        given = [word for name in NAMES for word in ("--lora", f"{name}={BADGE}")]
        given += ["--lora-rank", str(COLUMNS), "--lora-dir", folder]
        pooled = start_server("--dtype", options.dtype, *given, model="hypergen/emoji", key=None)
        plain = start_server("--dtype", options.dtype, model="hypergen/emoji", key=None)
        try:
            asyncio.run(_mixed_batches(pooled, plain, options.steps, options.runs))
            asyncio.run(_a_file_that_comes(pooled, Path(folder)))
        finally:
            stop_server(plain)
            stop_server(pooled)


async def _mixed_batches(pooled: Server, plain: Server, steps: int, runs: int) -> None:
    """Eight images at once, by turns: of a server without a pool, of one with four LoRAs, of that one without any."""
    with_loras = [[{"name": NAMES[number % len(NAMES)], "scale": 0.8}] for number in range(IMAGES)]
    seconds: dict[str, list[float]] = {"no pool": [], "four LoRAs": [], "a pool, no LoRA": []}
    async with pooled.async_client() as first, plain.async_client() as other:
        for run in range(runs + 1):
            seconds["no pool"].append(await _seconds(other, [[]] * IMAGES, steps, run))
            seconds["four LoRAs"].append(await _seconds(first, with_loras, steps, run))
            seconds["a pool, no LoRA"].append(await _seconds(first, [[]] * IMAGES, steps, run))
    base = seconds.pop("no pool")[1:]  # the first of each warms up
    print(f"{IMAGES} images of {steps} steps at once, no pool: {statistics.median(base):.3f} s")
    for name, measured in seconds.items():
        ratios = [mine / without for mine, without in zip(measured[1:], base, strict=True)]
        print(f"{name}: {statistics.median(ratios):.3f} of that ({min(ratios):.2f} to {max(ratios):.2f}, {runs} pairs)")


async def _seconds(client: openai.AsyncOpenAI, loras: list[list[Any]], steps: int, run: int) -> float:
    began = time.perf_counter()
    bodies = [{"seed": run, **({"loras": given} if given else {})} for given in loras]
    await asyncio.gather(*(generate(client, prompt="a rocket", num_inference_steps=steps, **body) for body in bodies))
    return time.perf_counter() - began


async def _a_file_that_comes(server: Server, folder: Path) -> None:
    """Images are generated before the file comes, until it is served, and a while after; none may fail."""
    waits: list[float] = []
    ended = False

    async def work(client: openai.AsyncOpenAI, name: str) -> None:
        while not ended:
            began = time.perf_counter()
            await generate(client, prompt="a rocket", lora_path=name)
            waits.append(time.perf_counter() - began)

    async with server.async_client() as client:
        working = [asyncio.create_task(work(client, name)) for name in NAMES[:IN_FLIGHT]]
        await asyncio.sleep(SECONDS_BEFORE)
        usual, count = max(waits), len(waits)
        began = time.perf_counter()
        _drop(folder / f"{COMING}.safetensors")
        await _until(lambda: generate(client, prompt="a rocket", lora_path=COMING))
        served = time.perf_counter() - began
        await asyncio.sleep(SECONDS_BEFORE)
        ended = True
        await asyncio.gather(*working)
    print(f"a file under load: served after {served:.1f} s; {len(waits)} images, none lost; ", end="")
    print(f"longest {usual:.2f} s before it and {max(waits[count:]):.2f} s after")


def _drop(file: Path) -> None:
    """Whole at once: a file that is still being written would be read again."""
    Path(shutil.copy(BADGE, file.with_suffix(".coming"))).rename(file)


async def _until(attempt: Callable[[], Awaitable[Any]]) -> None:
    """Try until the server knows the name."""
    deadline = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            await attempt()
            return
        except openai.BadRequestError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
