"""How a peer that is a library is driven from outside: a line of JSON for each image, on standard input and output.

Imports nothing but the standard library and numpy, which every peer's environment has. A worker says how it loads its
pipeline and how it draws; this says when, and for how long it took.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Job = dict[str, Any]
# A job to pixels [n, height, width, 3] or [height, width, 3], uint8.
Draw = Callable[[Job], Any]
# The line that names the checkpoint and the worker's options -> one function for each job that may run at a time.
Load = Callable[[Job], list[Draw]]


def serve(load: Load) -> None:
    """Load, say so, then answer jobs until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def answer(**fields: Any) -> None:
        with lock:
            answers.write(json.dumps(fields) + "\n")

    # Loaded, and first drawn, by the thread that draws: OpenMP keeps threads for each one that ever used it, and once
    # they are more than the cores none of them waits awake any more, which makes torch nearly twice as slow.
    loader = ThreadPoolExecutor(1)
    draws = loader.submit(load, json.loads(sys.stdin.readline())).result()
    idle = list(draws)
    answer(ready=True)
    with loader if len(draws) == 1 else ThreadPoolExecutor(len(draws)) as executor:
        for line in sys.stdin:
            executor.submit(_answer_one, json.loads(line), idle, answer)


def in_diffusers_words(job: Job) -> dict[str, Any]:
    """An image's settings, but for its seed, in the words of diffusers' pipelines and of those that copied them."""
    return {
        "width": job["width"],
        "height": job["height"],
        "num_inference_steps": job["steps"],
        "guidance_scale": job["guidance"],
        "num_images_per_prompt": job.get("images", 1),
    }


def _answer_one(job: Job, idle: list[Draw], answer: Callable[..., None]) -> None:
    draw = idle.pop()
    try:
        began = time.perf_counter()
        pixels = np.asarray(draw(job))
        seconds = time.perf_counter() - began
        answer(id=job["id"], seconds=seconds, shape=pixels.shape, spread=float(pixels.std()))
    except Exception as error:
        answer(id=job["id"], error=f"{type(error).__name__}: {error}"[:500])
    finally:
        idle.append(draw)
