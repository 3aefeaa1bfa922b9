"""What it costs that images share a denoiser call only if their prompts have as many chunks.

Eight images at once: all with a prompt of one chunk, all with one of three, and half of each. A command, not a test,
against the Triton of `hypergen serve`; by turns, and the medians:

    python tests/benchmarks/unequal_prompts.py 127.0.0.1:8001 --steps 20 --runs 7
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.plain_triton import ask

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
    with ThreadPoolExecutor(IMAGES) as pool:
        for run in range(options.runs + 1):
            for name, prompts in PROMPTS.items():
                began = time.perf_counter()
                requests = [
                    pool.submit(
                        ask,
                        options.url,
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="HOST:PORT of Triton's gRPC")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
