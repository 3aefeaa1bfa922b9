"""OpenVINO GenAI's Text2ImagePipeline on the checkpoint as `convert_for_genai.py` has converted it.

Loaded and compiled once. It runs one call at a time: each job that may run at a time has a pipeline of its own, and an
even share of the cores.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import openvino_genai

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.workers.protocol import Generate, Job, in_diffusers_words, serve


def load(options: Job) -> list[Generate]:
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": options["precision"]}
    pipelines = options["pipelines"]
    if pipelines > 1:
        properties["INFERENCE_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // pipelines))
    pipes = [_pipeline(options, properties) for _ in range(pipelines)]
    return [_generate(pipe) for pipe in pipes]


def _pipeline(options: Job, properties: dict[str, str]) -> Any:
    if "reshaped" not in options:
        return openvino_genai.Text2ImagePipeline(options["converted"], "CPU", **properties)
    # For one size and guidance alone, which is faster: OpenVINO's own advice where nothing else will be asked for.
    first = options["reshaped"]
    pipe = openvino_genai.Text2ImagePipeline(options["converted"])
    pipe.reshape(1, first["height"], first["width"], first["guidance"])
    pipe.compile("CPU", **properties)
    return pipe


def _generate(pipe: Any) -> Generate:
    def generate(job: Job) -> Any:
        return pipe.generate(job["prompt"], **in_diffusers_words(job), rng_seed=job["seed"]).data

    return generate


if __name__ == "__main__":
    serve(load)
