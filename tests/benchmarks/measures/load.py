"""Many requests at once: throughput by the number in flight, sizes mixed, and a short job behind long ones."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.contenders import GenerationRequest, Target, Worker
from benchmarks.environments import ToolError
from benchmarks.figures import Pairs, latency_figures, percentile, rate_figures
from benchmarks.measures.turns import Bench, in_flight
from benchmarks.peers import GENAI, GENAI_TWICE, HYPERGEN, OURS
from benchmarks.subjects import Workload

SHORT_STEPS, LONG_STEPS, LONG_JOBS = 4, 50, 8
# The long ones are at work when the short one comes.
HEAD_START_SECONDS = 0.2
FULL = 8


async def throughput(bench: Bench, subject: Workload) -> None:
    """Pictures per second of ours and HyperGen at every level, in turns; then of ours and OpenVINO GenAI at eight."""
    async with bench.running(OURS, subject) as ours:
        try:
            async with bench.running(HYPERGEN, subject) as theirs:
                await _by_level(bench, subject, ours, theirs)
        except ToolError as error:
            bench.fail("throughput_ours_over_hypergen_8_in_flight", error)
        try:
            await _beside_genai(bench, subject, ours)
        except ToolError as error:
            bench.fail("throughput_ours_over_openvino_genai_8_in_flight", error)


async def _by_level(bench: Bench, subject: Workload, ours: Target, theirs: Target) -> None:
    wishes = subject.wishes()
    rates: dict[int, tuple[list[float], list[float]]] = {level: ([], []) for level in bench.effort.levels}
    for contender in (ours, theirs):
        await in_flight(contender, wishes, 2, 2)
    for number, level in itertools.product(range(bench.effort.rounds), bench.effort.levels):
        bench.say(f"{subject.name}: {level} in flight, round {number + 1} of {bench.effort.rounds}")
        for side, contender in enumerate((ours, theirs)):
            rates[level][side].append(await in_flight(contender, wishes, level, max(FULL, 2 * level)))
    for level, (mine, hers) in rates.items():
        name = f"throughput_ours_over_hypergen_{level}_in_flight"
        bench.enter(rate_figures(name, "hypergen", Pairs(mine, hers)))
    bests = [max(each) for each in zip(*(mine for mine, _ in rates.values()), strict=True)]
    highest = max(bench.effort.levels)
    shares = [rate / best for rate, best in zip(rates[highest][0], bests, strict=True)]
    bench.enter({f"throughput_{highest}_in_flight_over_best": round(statistics.median(shares), 3)})


async def _beside_genai(bench: Bench, subject: Workload, ours: Target) -> None:
    """GenAI has no server: eight requests in turn, or by two pipelines with a core each: the faster counts."""
    name = "throughput_ours_over_openvino_genai_8_in_flight"
    wishes = subject.wishes()
    async with bench.running(GENAI, subject) as one, bench.running(GENAI_TWICE, subject) as two:
        for contender in (ours, one, two):
            await in_flight(contender, wishes, FULL, FULL)
        rates: dict[str, list[float]] = {"ours": [], "one": [], "two": [], "batch": []}
        for _ in range(bench.effort.rounds):
            for key, contender in (("ours", ours), ("one", one), ("two", two)):
                rates[key].append(await in_flight(contender, wishes, FULL, 2 * FULL))
            rates["batch"].append(await _batch(one, next(wishes)))
    theirs = [max(pair) for pair in zip(rates["one"], rates["two"], strict=True)]
    bench.enter(rate_figures(name, "openvino_genai", Pairs(rates["ours"], theirs)))
    batch = "throughput_ours_over_openvino_genai_8_pictures_of_one_prompt"
    bench.enter(rate_figures(batch, "openvino_genai", Pairs(rates["ours"], rates["batch"])))


async def _batch(worker: Worker, wish: GenerationRequest) -> float:
    """Pictures per second of eight of the same prompt in one call: all that GenAI can batch."""
    return FULL / await worker.draw(wish, images=FULL)


async def mixed_sizes(bench: Bench, subject: Workload) -> None:
    """Eight in flight, each of another size than the one before."""
    name = f"throughput_ours_over_hypergen_8_in_flight_mixed_sizes_{subject.name}"
    wishes = _of_mixed_sizes(subject)
    mine, hers = [], []
    try:
        async with bench.running(OURS, subject) as ours, bench.running(HYPERGEN, subject) as theirs:
            for contender in (ours, theirs):
                await in_flight(contender, wishes, FULL, len(subject.sizes))
            for _ in range(bench.effort.rounds):
                mine.append(await in_flight(ours, wishes, FULL, 4 * len(subject.sizes)))
                hers.append(await in_flight(theirs, wishes, FULL, 4 * len(subject.sizes)))
        bench.enter(rate_figures(name, "hypergen", Pairs(mine, hers)))
    except ToolError as error:
        bench.fail(name, error)


def _of_mixed_sizes(subject: Workload) -> Iterator[GenerationRequest]:
    sizes = itertools.cycle(subject.sizes)
    for wish, size in zip(subject.wishes(), sizes, strict=False):
        yield replace(wish, width=size, height=size)


async def short_behind_long(bench: Bench, subject: Workload) -> None:
    """What a job of 4 steps takes that comes when eight of 50 steps are at work: the p95 of both, their ratio."""
    name = "p95_short_behind_long_hypergen_over_ours"
    try:
        async with bench.running(OURS, subject) as ours, bench.running(HYPERGEN, subject) as theirs:
            taken: dict[str, list[float]] = {"ours": [], "hypergen": []}
            for number in range(bench.effort.rounds + 2):
                bench.say(f"{subject.name}: a short job behind eight long ones, {number + 1}")
                for key, contender in (("ours", ours), ("hypergen", theirs)):
                    taken[key].append(await _short_one(contender, subject))
    except ToolError as error:
        bench.fail(name, error)
        return
    figures = latency_figures(name, "hypergen", Pairs(taken["ours"], taken["hypergen"]))
    p95 = {key: percentile(seconds, 0.95) for key, seconds in taken.items()}
    bench.enter(figures | {name: round(p95["hypergen"] / p95["ours"], 3)})


async def _short_one(contender: Target, subject: Workload) -> float:
    long = subject.wishes(steps=LONG_STEPS)
    tasks = [asyncio.create_task(contender.draw(next(long))) for _ in range(LONG_JOBS)]
    await asyncio.sleep(HEAD_START_SECONDS)
    try:
        seconds = await contender.draw(next(subject.wishes(steps=SHORT_STEPS)))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return seconds
