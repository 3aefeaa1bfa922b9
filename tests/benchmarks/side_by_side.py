"""This server against every peer, on one machine in one run: a table of ratios, plots, and build/bench.json.

    make bench                              everything; 45 minutes on two cores, and as much again to set up at first
    make bench ARGS=--quick                 the shipped model alone, few pairs: under five minutes
    make bench ARGS="--only throughput one_image --peers floor,hypergen"

Peers, checkpoints and exports are kept under --work-dir. Figures are recorded as they are measured; a later run of some
parts completes an earlier one.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.circumstances import circumstances
from benchmarks.environments import BUILD
from benchmarks.figures import Results
from benchmarks.measures import hardware, images, load, serving
from benchmarks.measures.turns import Bench, Budget
from benchmarks.peers import PEERS, Environment
from benchmarks.report import bars_table, write_report
from benchmarks.workloads import Workload, flow, has_bf16, sd15, shipped

QUICK = Budget(pairs=5, large_pairs=1, rounds=1, levels=(1, 8))
FULL = Budget(pairs=30, large_pairs=3, rounds=3)

PARTS: Mapping[str, Callable[[Bench, Workload], Coroutine[Any, Any, None]]] = {
    "one_image": images.one_image,
    "hardware": hardware.hardware,
    "gateway": serving.gateway,
    "models": serving.models_per_second,
    "short_behind_long": load.short_behind_long,
    "throughput": load.throughput,
    "mixed_sizes": load.mixed_sizes,
    "one_core_busy": images.one_core_busy,
    "growth": images.growth,
    "start": serving.start,
    "first_start": serving.first_start,
}
# The other peers start slowly or add little.
QUICK_PEERS = ("floor", "hypergen", "hypergen_bfloat16", "openvino_genai", "diffusers")
FLOW_PARTS = ("one_image", "short_behind_long", "throughput")
LARGE_PARTS = ("one_image", "hardware", "one_core_busy")
QUICK_PARTS = ("one_image", "gateway", "models", "short_behind_long", "throughput")


def main() -> None:
    """Measure part after part, and write the results and the report after each."""
    options = _options()
    # SIGTERM stops the targets, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        environment=Environment(work=options.work_dir, hypergen=options.hypergen, dtype=options.dtype),
        results=Results(options.output),
        budget=QUICK if options.quick else FULL,
        peers=options.peers or (QUICK_PEERS if options.quick else tuple(PEERS)),
    )
    for workload, part in _plan(options):
        bench.say(f"{workload.name}: {part}")
        asyncio.run(PARTS[part](bench, workload))
        bench.results.enter(circumstances(bench.environment.work / "environments", options.dtype))
        report = write_report(options.output.parent / "side-by-side", bench.results.figures)
    print(f"{report}\n\n{bars_table(bench.results.figures)}")


def _plan(options: argparse.Namespace) -> Iterator[tuple[Workload, str]]:
    checkpoints = options.checkpoints or (["shipped"] if options.quick else ["shipped", "flow", "sd15"])
    if "shipped" in checkpoints:
        for part in options.only or (QUICK_PARTS if options.quick else PARTS):
            yield shipped(), part
    if "flow" in checkpoints:
        for part in options.only or FLOW_PARTS:
            yield flow(), part
    if "sd15" in checkpoints:
        for part in options.only or LARGE_PARTS:
            yield sd15(options.work_dir, options.large_steps), part


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="This server against every peer.")
    parser.add_argument("--quick", action="store_true", help="the shipped model alone, few pairs, under five minutes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--checkpoints", nargs="+", choices=["shipped", "flow", "sd15"], help="[default: all]")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--large-steps", type=int, default=4, help="of an image of the full-size model")
    parser.add_argument("--work-dir", type=Path, default=BUILD / "side-by-side")
    parser.add_argument("--output", type=Path, default=BUILD / "bench.json")
    parser.add_argument("--hypergen", type=Path, default=Path(sys.executable).parent / "hypergen")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if has_bf16() else "float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
