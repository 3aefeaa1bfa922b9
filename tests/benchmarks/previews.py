"""What previews cost: the time of a request with three against that of the same request with none.

A command, not a test, against a Triton that is up; one request at a time, by turns, and the medians of both:

    python tests/benchmarks/previews.py 127.0.0.1:8001 --steps 20 --runs 15
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.plain_triton import ask

PREVIEWS = (0, 3)


def main() -> None:
    options = _options()
    body = {"prompt": "a red rocket", "num_inference_steps": options.steps, "num_images": options.images}
    seconds: dict[int, list[float]] = {previews: [] for previews in PREVIEWS}
    for run in range(options.runs + 1):
        for previews in PREVIEWS:
            began = time.perf_counter()
            responses = ask(options.url, **body, partial_images=previews, seed=run)
            seconds[previews].append(time.perf_counter() - began)
            assert len(responses) == options.images * (1 + previews)
    without, with_previews = (statistics.median(seconds[previews][1:]) for previews in PREVIEWS)  # the first warms up
    height, width, _ = responses[0]["image"].shape
    print(f"{width}x{height}, {options.steps} steps, {options.images} at a time, median of {options.runs}:")
    print(f"{without * 1000:.0f} ms without previews, {with_previews * 1000:.0f} ms with three of each")
    print(f"ratio {with_previews / without:.2f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="HOST:PORT of Triton's gRPC")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
