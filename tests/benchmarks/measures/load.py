"""Concurrent requests: throughput by the number in flight, mixed sizes, and a short job behind long ones."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.environments import ToolError
from benchmarks.figures import Pairs, latency_figures, percentile, rate_figures
from benchmarks.measures.turns import Bench, in_flight
from benchmarks.peers import GENAI, GENAI_TWICE, HYPERGEN, OURS
from benchmarks.targets import GenerationRequest, Target, Worker
from benchmarks.workloads import Workload

SHORT_STEPS, LONG_STEPS, LONG_JOBS = 4, 50, 8
# The long jobs are in progress when the short one arrives.
HEAD_START_SECONDS = 0.2
FULL = 8


async def throughput(bench: Bench, workload: Workload) -> None:
    """Images per second against HyperGen 0.1 at each number in flight, then against OpenVINO GenAI at eight."""
    async with bench.running(OURS, workload) as ours:
        try:
            async with bench.running(HYPERGEN, workload) as theirs:
                await _by_level(bench, workload, ours, theirs)
        except ToolError as error:
            bench.fail(f"throughput_ours_over_hypergen_8_in_flight_{workload.name}", error)
        name = f"throughput_ours_over_openvino_genai_8_in_flight_{workload.name}"
        if workload.name not in GENAI.checkpoints:
            bench.fail(name, GENAI.why_not)
            return
        try:
            await _beside_genai(bench, workload, ours, name)
        except ToolError as error:
            bench.fail(name, error)


async def _by_level(bench: Bench, workload: Workload, ours: Target, theirs: Target) -> None:
    requests = workload.requests()
    rates: dict[int, tuple[list[float], list[float]]] = {level: ([], []) for level in bench.budget.levels}
    for level, target in itertools.product(bench.budget.levels, (ours, theirs)):
        # Each level has its own batch sizes, which models may be compiled for when they first occur.
        await in_flight(target, requests, level, 2 * level)
    for number, level in itertools.product(range(bench.budget.rounds), bench.budget.levels):
        bench.say(f"{workload.name}: {level} in flight, round {number + 1} of {bench.budget.rounds}")
        for side, target in enumerate((ours, theirs)):
            rates[level][side].append(await in_flight(target, requests, level, max(FULL, 2 * level)))
    for level, (mine, hers) in rates.items():
        name = f"throughput_ours_over_hypergen_{level}_in_flight_{workload.name}"
        bench.enter(rate_figures(name, "hypergen", Pairs(mine, hers)))
    bests = [max(each) for each in zip(*(mine for mine, _ in rates.values()), strict=True)]
    highest = max(bench.budget.levels)
    shares = [rate / best for rate, best in zip(rates[highest][0], bests, strict=True)]
    bench.enter({f"throughput_{highest}_in_flight_over_best_{workload.name}": round(statistics.median(shares), 3)})


async def _beside_genai(bench: Bench, workload: Workload, ours: Target, name: str) -> None:
    """GenAI has no server: one pipeline takes requests in turn, or two with a core each; the faster counts."""
    requests = workload.requests()
    async with bench.running(GENAI, workload) as one, bench.running(GENAI_TWICE, workload) as two:
        for target in (ours, one, two):
            await in_flight(target, requests, FULL, FULL)
        rates: dict[str, list[float]] = {"ours": [], "one": [], "two": [], "batch": []}
        for _ in range(bench.budget.rounds):
            for key, target in (("ours", ours), ("one", one), ("two", two)):
                rates[key].append(await in_flight(target, requests, FULL, 2 * FULL))
            rates["batch"].append(await _batch(one, next(requests)))
    theirs = [max(pair) for pair in zip(rates["one"], rates["two"], strict=True)]
    bench.enter(rate_figures(name, "openvino_genai", Pairs(rates["ours"], theirs)))
    batch = f"throughput_ours_over_openvino_genai_8_images_of_one_prompt_{workload.name}"
    bench.enter(rate_figures(batch, "openvino_genai", Pairs(rates["ours"], rates["batch"])))


async def _batch(worker: Worker, request: GenerationRequest) -> float:
    """Images per second for eight images of one prompt in one call, the only batching that GenAI has."""
    return FULL / await worker.generate(request, images=FULL)


async def mixed_sizes(bench: Bench, workload: Workload) -> None:
    """Eight requests in flight, with sizes that change from each to the next."""
    name = f"throughput_ours_over_hypergen_8_in_flight_mixed_sizes_{workload.name}"
    requests = _of_mixed_sizes(workload)
    mine, hers = [], []
    try:
        async with bench.running(OURS, workload) as ours, bench.running(HYPERGEN, workload) as theirs:
            for target in (ours, theirs):
                await in_flight(target, requests, FULL, len(workload.sizes))
            for _ in range(bench.budget.rounds):
                mine.append(await in_flight(ours, requests, FULL, 4 * len(workload.sizes)))
                hers.append(await in_flight(theirs, requests, FULL, 4 * len(workload.sizes)))
        bench.enter(rate_figures(name, "hypergen", Pairs(mine, hers)))
    except ToolError as error:
        bench.fail(name, error)


def _of_mixed_sizes(workload: Workload) -> Iterator[GenerationRequest]:
    sizes = itertools.cycle(workload.sizes)
    for request, size in zip(workload.requests(), sizes, strict=False):
        yield replace(request, width=size, height=size)


async def short_behind_long(bench: Bench, workload: Workload) -> None:
    """Latency of a 4-step job while eight 50-step jobs are in progress: each side's p95, and their ratio."""
    name = f"p95_short_behind_long_hypergen_over_ours_{workload.name}"
    try:
        async with bench.running(OURS, workload) as ours, bench.running(HYPERGEN, workload) as theirs:
            taken: dict[str, list[float]] = {"ours": [], "hypergen": []}
            for number in range(bench.budget.rounds + 2):
                bench.say(f"{workload.name}: a short job behind eight long ones, {number + 1}")
                for key, target in (("ours", ours), ("hypergen", theirs)):
                    taken[key].append(await _short_one(target, workload))
    except ToolError as error:
        bench.fail(name, error)
        return
    figures = latency_figures(name, "hypergen", Pairs(taken["ours"], taken["hypergen"]))
    p95 = {key: percentile(seconds, 0.95) for key, seconds in taken.items()}
    bench.enter(figures | {name: round(p95["hypergen"] / p95["ours"], 3)})


async def _short_one(target: Target, workload: Workload) -> float:
    long = workload.requests(steps=LONG_STEPS)
    tasks = [asyncio.create_task(target.generate(next(long))) for _ in range(LONG_JOBS)]
    await asyncio.sleep(HEAD_START_SECONDS)
    try:
        seconds = await target.generate(next(workload.requests(steps=SHORT_STEPS)))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return seconds
