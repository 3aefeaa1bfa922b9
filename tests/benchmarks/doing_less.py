"""What an image costs and how good it is when less is done for it, on the shipped model.

A command, not a test, against `hypergen serve --deep-cache`. Every prompt is generated under every setting before the
next one, one image at a time; times are ratios to the same prompt's image with nothing left out, and their median:

    python tests/benchmarks/doing_less.py http://127.0.0.1:8000/v1 --count 200

With `--pid`, the server's process, time is the CPU time of all its processes, which other programs disturb less. With
`--float32`, a server of the same model in float32, there is the distance to its images of many steps, too: what less
work loses of what the model would draw with more.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "export" / "emoji"))
from evaluate import Task, random_tasks, score_images

OFF = "nothing left out"
# What a request says beside prompt and seed.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    OFF: {},
    "guidance in the first half": {"guidance_end": 0.5},
    "guidance in the second half": {"guidance_start": 0.5},
    "guidance from 0.2 to 0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
    "guidance from 0.2 to 0.6": {"guidance_start": 0.2, "guidance_end": 0.6},
    "guidance from 0.1 to 0.4": {"guidance_start": 0.1, "guidance_end": 0.4},
    "guidance in the first 0.3": {"guidance_end": 0.3},
    "no guidance": {"guidance_scale": 1.0},
    "deep features of every 2nd step": {"cache_interval": 2},
    "deep features of every 3rd step": {"cache_interval": 3},
    "deep features of every 5th step": {"cache_interval": 5},
    "every 2nd step, guidance in the first half": {"cache_interval": 2, "guidance_end": 0.5},
    "every 3rd step, guidance in the first half": {"cache_interval": 3, "guidance_end": 0.5},
    **{f"{steps} of 10 steps": {"num_inference_steps": steps} for steps in (9, 8, 7, 6, 5, 4)},
}
MANY_STEPS = {"num_inference_steps": 100}
SEED = 11


@dataclass
class Results:
    """The images of one setting in the order of the tasks, the seconds that each took, and how far each is from that
    of many steps.
    """

    images: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)


@click.command(help=__doc__)
@click.argument("url")
@click.option("--key", envvar="HYPERGEN_API_KEY", help="The server's API key.")
@click.option("--count", default=200, show_default=True, help="Prompts.")
@click.option("--only", multiple=True, help="Settings whose name holds this; repeatable.")
@click.option("--pid", type=int, help="The server's process, for CPU time instead of the clock's.")
@click.option("--float32", metavar="URL", help="A server of the same model in float32.")
def main(url: str, key: str | None, count: int, only: tuple[str, ...], pid: int | None, float32: str | None) -> None:
    chosen = {
        name: fields
        for name, fields in SETTINGS.items()
        if name == OFF or not only or any(words in name for words in only)
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    tasks = random_tasks(count, SEED)
    clock = time.perf_counter if pid is None else functools.partial(cpu_seconds, psutil.Process(pid))
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=60) as client:
        results = generate_by_turns(client, tasks, chosen, clock)
    if float32 is not None:
        with httpx.Client(base_url=float32.rstrip("/"), headers=headers, timeout=60) as client:
            _measure_distances(client, tasks, results)
    click.echo(f"{count} prompts, {os.cpu_count()} CPUs\n")
    click.echo("| | time | emoji right | colour right | RMSE | RMSE to many steps |\n|---|---|---|---|---|---|")
    for name, own in results.items():
        click.echo(_row(name, own, results[OFF], tasks, by_sum=pid is not None))


def cpu_seconds(process: psutil.Process) -> float:
    """The CPU time of a process and all that it has started."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(own.user + own.system for own in times)


def _measure_distances(client: httpx.Client, tasks: list[Task], results: Mapping[str, Results]) -> None:
    for number, task in enumerate(tqdm(tasks, desc="many steps in float32", leave=False)):
        reference = np.asarray(_generate(client, task, MANY_STEPS), dtype=float)
        for own in results.values():
            difference = np.asarray(own.images[number], dtype=float) - reference
            own.distances.append(float(np.sqrt(np.square(difference).mean())) / 255)


def generate_by_turns(
    client: httpx.Client,
    tasks: list[Task],
    settings: Mapping[str, Mapping[str, Any]],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Results]:
    """Every task under every setting; a first round, which warms up, is not counted."""
    results = {name: Results() for name in settings}
    for number, task in enumerate(tqdm([tasks[0], *tasks], desc="prompts", leave=False)):
        for name, fields in settings.items():
            began = clock()
            image = _generate(client, task, fields)
            if number > 0:
                results[name].seconds.append(clock() - began)
                results[name].images.append(image)
    return results


def _generate(client: httpx.Client, task: Task, fields: Mapping[str, Any]) -> Image.Image:
    body = {"prompt": task.request.prompt, "seed": task.request.seed, "response_format": "b64_json", **fields}
    response = client.post("images/generations", json=body)
    response.raise_for_status()
    return Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))).convert("RGB")


def _row(name: str, own: Results, off: Results, tasks: list[Task], *, by_sum: bool) -> str:
    # CPU time is counted in hundredths of a second, too coarse for a single image.
    pairs = [(sum(own.seconds), sum(off.seconds))] if by_sum else zip(own.seconds, off.seconds, strict=True)
    ratio = statistics.median(mine / others for mine, others in pairs)
    seen = score_images(own.images, tasks)
    distance = f"{statistics.fmean(own.distances):.4f}" if own.distances else ""
    return f"| {name} | {ratio:.2f} | {seen.emoji:.1%} | {seen.colour:.1%} | {seen.rmse:.3f} | {distance} |"


if __name__ == "__main__":
    main()
