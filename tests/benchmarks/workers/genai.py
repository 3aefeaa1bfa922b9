"""OpenVINO GenAI's Text2ImagePipeline on the checkpoint as `convert_for_genai.py` has converted it.

Loaded and compiled once. Each job that may run at a time has a clone, which shares the compiled models.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import openvino_genai

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.workers.protocol import Draw, Job, serve


def load(options: Job) -> list[Draw]:
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": options["precision"]}
    if options["precision"] == "default":
        del properties["INFERENCE_PRECISION_HINT"]
    first = openvino_genai.Text2ImagePipeline(options["converted"], "CPU", **properties)
    pipes = [first, *(first.clone() for _ in range(options.get("at_a_time", 1) - 1))]
    return [_draw(pipe) for pipe in pipes]


def _draw(pipe: Any) -> Draw:
    def draw(job: Job) -> Any:
        return pipe.generate(
            job["prompt"],
            width=job["width"],
            height=job["height"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            num_images_per_prompt=job.get("images", 1),
            rng_seed=job["seed"],
        ).data

    return draw


if __name__ == "__main__":
    serve(load)
