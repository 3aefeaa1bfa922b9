"""What LoRAs cost: eight images with four of them beside eight without, and a file that comes while others are drawn.

A command, not a test. Two servers take turns, one with a rank pool and one that has none; then a file is dropped into
the folder of the first, while it generates four images at a time:

    python tests/benchmarks/lora_cost.py [--columns 32] [--dtype float32] [--steps 20] [--runs 15]
    python tests/benchmarks/lora_cost.py --checkpoint build/bench/checkpoints/sd15 --steps 4 --runs 2

The LoRA of the shipped model is its own; that of another checkpoint with a UNet has random weights for the linear
layers of its attentions.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import ROOT
from support.running_server import Server, generate, start_server, stop_server

BADGE = ROOT / "export" / "emoji" / "loras" / "badge.safetensors"
# Each is the same file, but has columns of its own.
NAMES = ("one", "two", "three", "four")
COMING = "five"
ATTENTION = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
IMAGES = 8
IN_FLIGHT = 4
LONGEST_WAIT = 120.0
SECONDS_BEFORE = 5.0


def main() -> None:
    """Print both costs."""
    options = _options()
    model = options.checkpoint or "hypergen/emoji"
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as folder:
        file = _random_lora(Path(model), options.columns // len(NAMES), Path(place)) if options.checkpoint else BADGE
        given = [word for name in NAMES for word in ("--lora", f"{name}={file}")]
        given += ["--lora-rank", str(options.columns), "--lora-dir", folder]
        usual = ["--dtype", options.dtype, *(["--cache-dir", options.cache_dir] if options.cache_dir else [])]
        servers: list[Server] = []
        try:
            for arguments in (given, []):
                servers.append(start_server(*usual, *arguments, model=model, key=None))
            pooled, plain = servers
            asyncio.run(_mixed_batches(pooled, plain, options.steps, options.runs))
            if not options.checkpoint:
                asyncio.run(_a_file_that_comes(pooled, Path(folder)))
        finally:
            for server in servers:
                stop_server(server)


def _random_lora(checkpoint: Path, rank: int, folder: Path) -> Path:
    """A LoRA for the linear layers of the attentions of a UNet, by peft's names."""
    (weights,) = checkpoint.joinpath("unet").glob("*.safetensors")
    chance = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if name.endswith(ATTENTION):
                outputs, inputs = file.get_slice(name).get_shape()
                layer = f"unet.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = torch.randn((rank, inputs), generator=chance) * inputs**-0.5
                tensors[f"{layer}.lora_B.weight"] = torch.randn((outputs, rank), generator=chance) * 0.01
    save_file(tensors, folder / "random.safetensors")
    return folder / "random.safetensors"


async def _mixed_batches(pooled: Server, plain: Server, steps: int, runs: int) -> None:
    """Eight images at once, by turns: of a server without a pool, of one with four LoRAs, of that one without any."""
    with_loras = [[{"name": NAMES[number % len(NAMES)], "scale": 0.8}] for number in range(IMAGES)]
    measured: dict[str, list[_Batch]] = {"no pool": [], "four LoRAs": [], "a pool, no LoRA": []}
    async with pooled.async_client() as first, plain.async_client() as other:
        for run in range(runs + 1):
            measured["no pool"].append(await _batch(plain, other, [[]] * IMAGES, steps, run))
            measured["four LoRAs"].append(await _batch(pooled, first, with_loras, steps, run))
            measured["a pool, no LoRA"].append(await _batch(pooled, first, [[]] * IMAGES, steps, run))
    base = measured["no pool"][1:]  # the first of each warms up
    print(
        f"{IMAGES} images of {steps} steps at once, no pool: {statistics.median(each.seconds for each in base):.3f} s"
    )
    for name, batches in measured.items():
        pairs = list(zip(batches[1:], base, strict=True))
        whole, calls = (
            [getattr(mine, what) / getattr(without, what) for mine, without in pairs]
            for what in ("seconds", "row_seconds")
        )
        print(
            f"{name}: {statistics.median(whole):.3f} of that ({min(whole):.2f} to {max(whole):.2f}, {runs} pairs); ",
            end="",
        )
        print(f"a row of a UNet call {statistics.median(calls):.3f}; {batches[-1].executions} UNet calls")


@dataclass(frozen=True)
class _Batch:
    """How long a batch took in all, and a row of its UNet calls; and how many calls there were."""

    seconds: float
    row_seconds: float
    executions: int


async def _batch(server: Server, client: openai.AsyncOpenAI, loras: list[list[Any]], steps: int, run: int) -> _Batch:
    rows, executions = server.counts_of()
    in_calls = server.seconds_in_calls()
    began = time.perf_counter()
    bodies = [{"seed": run, **({"loras": given} if given else {})} for given in loras]
    await asyncio.gather(*(generate(client, prompt="a rocket", num_inference_steps=steps, **body) for body in bodies))
    seconds = time.perf_counter() - began
    new_rows, new_executions = server.counts_of()
    row_seconds = (server.seconds_in_calls() - in_calls) / (new_rows - rows)
    return _Batch(seconds, row_seconds, new_executions - executions)


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
    parser.add_argument("--checkpoint", help="the shipped model, if not given")
    parser.add_argument("--cache-dir")
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
