"""Ours beside every peer, on the same machine in the same run: a table of ratios, plots, and build/bench.json.

    make bench                              everything; 45 minutes on two cores
    make bench ARGS=--quick                 the shipped model alone, few pairs; under five minutes
    python tests/benchmarks/side_by_side.py --only pictures --peers floor,hypergen

Peers install themselves into folders of their own under --work-dir and stay there, as do the checkpoints and their
exports. Figures are entered as they come; a later run of some parts completes an earlier one's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import BUILD, ToolError
from benchmarks.figures import Book
from benchmarks.measures import Bench, Effort, pictures
from benchmarks.peers import PEERS, Ground
from benchmarks.subjects import has_bf16, sd15, shipped

QUICK = Effort(pairs=5, large_pairs=1)
FULL = Effort(pairs=15, large_pairs=3)


def main() -> None:
    options = _options()
    asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> None:
    ground = Ground(work=options.work_dir, hypergen=options.hypergen, dtype=options.dtype)
    bench = Bench(
        ground=ground, book=Book(options.output), effort=QUICK if options.quick else FULL, peers=options.peers
    )
    await pictures(bench, shipped())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ours beside every peer.")
    parser.add_argument("--quick", action="store_true", help="the shipped model alone, few pairs")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--work-dir", type=Path, default=BUILD / "side-by-side")
    parser.add_argument("--output", type=Path, default=BUILD / "bench.json")
    parser.add_argument("--hypergen", type=Path, default=Path(sys.executable).parent / "hypergen")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if has_bf16() else "float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
