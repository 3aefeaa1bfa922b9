"""diffusers' own pipeline, in the precision asked for, compiled by torch if asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.workers.protocol import Generate, Job, in_diffusers_words, serve


def load(options: Job) -> list[Generate]:
    pipe = DiffusionPipeline.from_pretrained(options["checkpoint"], torch_dtype=getattr(torch, options["dtype"]))
    pipe.set_progress_bar_config(disable=True)
    if options.get("compile"):
        # In the layout that convolutions prefer, as diffusers' guide to speed has it.
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)

    def generate(job: Job) -> Any:
        generator = torch.Generator("cpu").manual_seed(job["seed"])
        return pipe(job["prompt"], **in_diffusers_words(job), generator=generator).images

    generate(options["first"])
    return [generate]


if __name__ == "__main__":
    serve(load)
