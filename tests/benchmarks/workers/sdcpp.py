"""stable-diffusion.cpp through its Python package, on the diffusers folder, which it reads itself.

All cores (its own default is half of them), weights in the precision of the checkpoint, convolutions done directly, and
no flash attention, which is meant for GPUs and takes longer here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from stable_diffusion_cpp import StableDiffusion

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.workers.protocol import Generate, Job, serve


def load(options: Job) -> list[Generate]:
    model = StableDiffusion(
        model_path=options["checkpoint"],
        n_threads=len(os.sched_getaffinity(0)),
        vae_decode_only=True,
        diffusion_conv_direct=True,
        vae_conv_direct=True,
        verbose=False,
    )

    def generate(job: Job) -> Any:
        (image,) = model.generate_image(
            prompt=job["prompt"],
            width=job["width"],
            height=job["height"],
            sample_steps=job["steps"],
            cfg_scale=job["guidance"],
            sample_method="euler",
            seed=job["seed"],
        )
        return np.asarray(image.convert("RGB"))  # it comes with an alpha channel

    return [generate]


if __name__ == "__main__":
    serve(load)
