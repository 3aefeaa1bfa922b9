"""How a peer that is a library is driven from outside: a line of JSON for each image, on standard input and output.

Imports nothing but the standard library and numpy, which every peer's environment has. A worker says how it loads its
pipeline and how it generates; this says when, and for how long it took.
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
Generate = Callable[[Job], Any]
# The line that names the checkpoint and the worker's options -> one function for each job that may run at a time.
Load = Callable[[Job], list[Generate]]


def serve(load: Load) -> None:
    """Load, say so, then answer jobs until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def answer(**fields: Any) -> None:
        with lock:
            answers.write(json.dumps(fields) + "\n")

    # The thread that generates also loads the model and generates first: OpenMP keeps threads for each thread that
    # ever used it, and once they outnumber the cores they no longer spin, which makes torch nearly twice as slow.
    loader = ThreadPoolExecutor(1)
    generates = loader.submit(load, json.loads(sys.stdin.readline())).result()
    idle = list(generates)
    answer(ready=True)
    with loader if len(generates) == 1 else ThreadPoolExecutor(len(generates)) as executor:
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


def _answer_one(job: Job, idle: list[Generate], answer: Callable[..., None]) -> None:
    generate = idle.pop()
    try:
        began = time.perf_counter()
        pixels = np.asarray(generate(job))
        seconds = time.perf_counter() - began
        answer(id=job["id"], seconds=seconds, shape=pixels.shape, spread=float(pixels.std()))
    except Exception as error:
        answer(id=job["id"], error=f"{type(error).__name__}: {error}"[:500])
    finally:
        idle.append(generate)
