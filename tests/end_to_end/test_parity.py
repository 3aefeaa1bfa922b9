"""Images of the server against those of diffusers' own pipeline: same weights, noise and scheduler, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from support.chunks import ByChunks
from support.guidance_interval import interval_arguments
from support.running_server import Pixels, pixels_of

PROMPT = "a red rocket on a blue background"
STEPS = 6
# Of 255: the engine's rounding differs from torch's, and a value near x.5 may become another byte.
TOLERANCE = 0.1
FLOOR = Path(__file__).parents[1] / "benchmarks" / "workers" / "floor.py"

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}


def by_diffusers(pipeline: Any, **fields: Any) -> Pixels:
    generator = torch.Generator().manual_seed(fields.pop("seed"))
    image = pipeline(**fields, num_inference_steps=STEPS, generator=generator).images[0]
    return np.asarray(image)


def by_server(client: openai.OpenAI, prompt: str, **fields: Any) -> Pixels:
    size = f"{fields.pop('width', 64)}x{fields.pop('height', 64)}"
    response = client.images.generate(
        prompt=prompt,
        size=size,
        extra_body=fields | {"num_inference_steps": STEPS},
    )
    assert response.data is not None
    return pixels_of(response.data[0])


def difference(ours: Pixels, theirs: Pixels) -> float:
    """Mean absolute difference, in steps of 1/255; `pytest -rP` shows it."""
    assert ours.shape == theirs.shape
    distances = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"mean difference {distances.mean():.4f}/255, largest {distances.max()}/255")
    return float(distances.mean())


@pytest.mark.parametrize("negative_prompt", [None, "a green cat"], ids=["no negative", "negative"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_equals_the_one_of_diffusers(
    scheduler: str,
    guidance_scale: float,
    negative_prompt: str | None,
    pipeline: Any,
    client: openai.OpenAI,
    checkpoint: Path,
) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": guidance_scale, "seed": 5}
    if negative_prompt:
        fields["negative_prompt"] = negative_prompt
    ours = by_server(client, **fields, scheduler=scheduler)
    pipeline.scheduler = SCHEDULERS[scheduler].from_pretrained(checkpoint / "scheduler")
    theirs = by_diffusers(pipeline, **fields)
    assert theirs.std() > 10, "a flat image would prove nothing"
    assert difference(ours, theirs) <= TOLERANCE


def test_a_size_that_the_unets_levels_do_not_divide_equals_diffusers_too(
    pipeline: Any, client: openai.OpenAI, checkpoint: Path
) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 3.0, "seed": 6, "width": 104, "height": 72}
    ours = by_server(client, **fields, scheduler="ddim")
    pipeline.scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    assert difference(ours, by_diffusers(pipeline, **fields)) <= TOLERANCE


def test_a_prompt_of_several_chunks_equals_diffusers_of_the_joined_chunks(
    pipeline: Any, client: openai.OpenAI, checkpoint: Path
) -> None:
    chunks = {"cat " * 14 + "red rocket": ("cat " * 14, "red rocket"), "a green cat": ("a green cat",)}
    prompt, negative_prompt = chunks
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": 5.0, "seed": 5}
    ours = by_server(client, **fields, scheduler="ddim")
    pipeline.scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    assert difference(ours, by_diffusers(ByChunks(pipeline, chunks), **fields)) <= TOLERANCE


def test_guidance_in_an_interval_of_the_steps_equals_diffusers_too(
    pipeline: Any, client: openai.OpenAI, checkpoint: Path
) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 7.5, "seed": 8, "width": 104, "height": 72}
    throughout = by_server(client, **fields, scheduler="ddim")
    ours = by_server(client, **fields, scheduler="ddim", guidance_start=0.2, guidance_end=0.7)
    pipeline.scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    theirs = by_diffusers(pipeline, **interval_arguments(pipeline, fields, 0.2, 0.7))
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(ours, throughout) > 10 * TOLERANCE, "the interval changes nothing"


def test_the_checkpoints_own_scheduler_is_the_default(pipeline: Any, client: openai.OpenAI, checkpoint: Path) -> None:
    from diffusers import PNDMScheduler

    fields: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 3.0, "seed": 7}
    pipeline.scheduler = PNDMScheduler.from_pretrained(checkpoint / "scheduler")
    assert difference(by_server(client, **fields), by_diffusers(pipeline, **fields)) <= TOLERANCE


def test_image_i_of_a_request_is_the_image_of_seed_plus_i(client: openai.OpenAI) -> None:
    response = client.images.generate(prompt=PROMPT, n=3, extra_body={"seed": 20, "num_inference_steps": STEPS})
    assert response.data is not None
    assert [image.seed for image in response.data] == [20, 21, 22]  # type: ignore[attr-defined]
    alone = client.images.generate(prompt=PROMPT, extra_body={"seed": 22, "num_inference_steps": STEPS})
    assert alone.data is not None
    assert difference(pixels_of(response.data[2]), pixels_of(alone.data[0])) <= TOLERANCE


def test_the_floor_of_the_benchmarks_generates_the_same_image(client: openai.OpenAI, exported: Path) -> None:
    """Of its image it tells the shape and the standard deviation."""
    options = {"repository": str(exported), "precision": "f32", "latent_channels": 4}
    job = {"id": 1, "prompt": PROMPT, "width": 64, "height": 64, "steps": STEPS, "guidance": 7.5, "seed": 5}
    lines = "\n".join(map(json.dumps, (options, job)))
    done = subprocess.run([sys.executable, FLOOR], input=lines, capture_output=True, text=True, timeout=300, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer.get("shape") == [1, 64, 64, 3], answer
    ours = by_server(client, PROMPT, guidance_scale=7.5, seed=5)
    assert answer["spread"] == pytest.approx(ours.std(), abs=0.01)
