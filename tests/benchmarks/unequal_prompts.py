"""What it costs that images share a denoiser call only if their prompts have as many chunks.

Eight images at once: all with a prompt of one chunk, all with one of three, and half of each. A command, not a test; by
turns, and the medians. Without --url it starts `hypergen serve` with the shipped model:

    python tests/benchmarks/unequal_prompts.py --steps 20 --runs 7
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.plain_triton import ask
from support.running_server import start_server, stop_server

IMAGES = 8
SHORT = "a red rocket"
LONG = f"{SHORT} BREAK {SHORT} BREAK {SHORT}"
PROMPTS = {
    "one chunk": [SHORT] * IMAGES,
    "three chunks": [LONG] * IMAGES,
    "half of each": [SHORT, LONG] * (IMAGES // 2),
}


def main() -> None:
    """Print the seconds of each, and of the mixture beside the mean of the others."""
    options = _options()
    seconds: dict[str, list[float]] = {name: [] for name in PROMPTS}
    with _triton(options.url) as url, ThreadPoolExecutor(IMAGES) as pool:
        for run in range(options.runs + 1):
            for name, prompts in PROMPTS.items():
                began = time.perf_counter()
                requests = [
                    pool.submit(
                        ask,
                        url,
                        prompt=prompt,
                        prompt_weighting="a1111",
                        num_inference_steps=options.steps,
                        seed=run,
                    )
                    for prompt in prompts
                ]
                for request in requests:
                    request.result()
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(given[1:]) for name, given in seconds.items()}  # the first warms up
    for name, median in medians.items():
        print(f"{IMAGES} images, {name}: {median:.2f} s")
    equal = (medians["one chunk"] + medians["three chunks"]) / 2
    print(f"half of each takes {medians['half of each'] / equal:.2f} of the mean of the others")


@contextlib.contextmanager
def _triton(url: str | None) -> Iterator[str]:
    """HOST:PORT of the Triton that is measured."""
    if url:
        yield url
        return
    server = start_server(model="hypergen/emoji", key=None)
    try:
        yield server.triton_url
    finally:
        stop_server(server)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", metavar="HOST:PORT", help="Triton's gRPC")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
