"""Exporter's tables and sampler's mathematics together, in torch, against diffusers' own pipeline of each family.

The same weights, prompt, seed and scheduler on both sides, in float32. What the engines add to this is held against
torch in tests/export, and the whole of it in tests/end_to_end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DiffusionPipeline

from conditions import Array, conditions_of, merge, outputs_of, texts_of
from contract import Architecture, Request
from hypergen_export.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.defaults import checkpoint_parameters
from hypergen_export.examples import by_name
from hypergen_export.loading import load_module
from hypergen_export.tokenizer import write_tokenizer
from hypergen_export.wrappers import wrap
from miniature import FAMILIES, save_miniature
from prompts import PromptTokenizers
from samplers import SCHEDULERS
from sampling import Image, UNetRows
from stepping import StepLoop

PROMPT = "a red rocket on a blue background"
NEGATIVES = {"no negative": None, "an empty one": "", "a negative": "a green cat"}
# Relative to the largest latent. Both sides are torch in float32; ours runs the UNet on each image's own timestep.
TOLERANCE = 1e-5
Pixels = npt.NDArray[np.uint8]


@dataclass
class Sampler:
    """The sampler as `model.py` puts it together, on torch modules in place of Triton's."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenize: PromptTokenizers
    modules: dict[str, torch.nn.Module]
    rows_of_calls: list[int]

    async def draw(self, request: Request, loop: StepLoop | None = None) -> tuple[Array, Pixels]:
        """The final latents [C, h, w] and the picture."""
        conditions = conditions_of(request, self.encode(texts_of(request, self.architecture)), self.architecture)
        shape = (4, request.height // 8, request.width // 8)
        image = Image(request, conditions, shape, dict(self.checkpoint.scheduler))
        latents = (await (loop or self.loop()).sample(image, lambda: False)).latents
        return latents, self.run("vae_decoder", latents=latents[None])["image"][0]

    def loop(self) -> StepLoop:
        return StepLoop(self.unet, max_rows=16, max_active=8, max_waiting=8)

    def encode(self, texts: list[str]) -> dict[str, Array]:
        needed = zip(
            self.architecture.text_encoders, self.tokenize(texts).ids, outputs_of(self.architecture), strict=True
        )
        answers = [(self.run(encoder, input_ids=ids), outputs) for encoder, ids, outputs in needed]
        return merge([{name: answer[name] for name in outputs} for answer, outputs in answers])

    async def unet(self, rows: UNetRows) -> Array:
        self.rows_of_calls.append(len(rows.sample))
        inputs = {"sample": rows.sample, "timestep": rows.timestep, **rows.conditions}
        answer: Array = self.run("unet", **inputs)["model_output"]
        return answer

    def run(self, name: str, **inputs: npt.NDArray[Any]) -> dict[str, Any]:
        (component,) = (each for each in self.checkpoint.family.components if each.name == name)
        tensors = tuple(torch.from_numpy(inputs[tensor.name]) for tensor in component.inputs)
        with torch.no_grad():
            answer = self.modules[name](**by_name(component, tensors))
        answers = answer if isinstance(answer, tuple) else (answer,)
        return {tensor.name: one.numpy() for tensor, one in zip(component.outputs, answers, strict=True)}


@dataclass
class Pair:
    sampler: Sampler
    pipeline: Any


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> our sampler and diffusers' pipeline of its miniature."""

    @functools.cache
    def make(family: str) -> Pair:
        folder = save_miniature(tmp_path_factory.mktemp("families") / family, family=family)
        return Pair(sampler_of(folder), pipeline_of(folder))

    return make


def sampler_of(folder: Path) -> Sampler:
    checkpoint = open_checkpoint(str(folder))
    for name in checkpoint.family.tokenizers:
        write_tokenizer(checkpoint, name, folder / f"{name}.json")
    parameters = checkpoint_parameters(checkpoint, SCHEDULERS)
    config = json.dumps({"parameters": {name: {"string_value": value} for name, value in parameters.items()}})
    architecture = Architecture.from_model_config(config)
    modules = {each.name: wrap(each, load_module(checkpoint, each)) for each in checkpoint.family.components}
    return Sampler(checkpoint, architecture, PromptTokenizers(folder, architecture.tokenizers), modules, [])


def pipeline_of(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def request_of(**changes: Any) -> Request:
    wish: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": None,
        "num_images": 1,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "scheduler": "",
        "seed": 11,
    }
    return Request(**(wish | changes))


def by_diffusers(pipeline: Any, request: Request) -> tuple[Array, Pixels]:
    wish: dict[str, Any] = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    }
    if request.negative_prompt is not None:
        wish["negative_prompt"] = request.negative_prompt
    runs = [
        pipeline(**wish, generator=torch.Generator().manual_seed(request.seed), output_type=kind).images[0]
        for kind in ("latent", "pil")
    ]
    return runs[0].numpy(), np.asarray(runs[1])


def held(ours: tuple[Array, Pixels], theirs: tuple[Array, Pixels]) -> None:
    """Latents to rounding, pictures to a level of 255 where a value lies on the edge of two."""
    difference = float(np.abs(ours[0] - theirs[0]).max() / np.abs(theirs[0]).max())
    levels = np.abs(ours[1].astype(int) - theirs[1].astype(int))
    print(f"latents differ by {difference:.1e} of the largest, pictures by {levels.mean():.4f}/255, {levels.max()}/255")
    assert theirs[1].std() > 10, "a flat picture would prove nothing"
    assert difference <= TOLERANCE
    assert levels.max() <= 1
    assert levels.mean() <= 0.01


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_familys_picture_equals_the_one_of_diffusers_pipeline(family: str, pair_of: Any) -> None:
    pair = pair_of(family)
    request = request_of(width=72, height=56)
    held(await pair.sampler.draw(request), by_diffusers(pair.pipeline, request))
    assert set(pair.sampler.rows_of_calls) == {1}


@pytest.mark.parametrize("negative_prompt", NEGATIVES.values(), ids=NEGATIVES.keys())
@pytest.mark.parametrize("family", ["sd-2", "sdxl", "sdxl-turbo"])
async def test_guidance_equals_that_of_diffusers_pipeline(
    family: str, negative_prompt: str | None, pair_of: Any
) -> None:
    pair = pair_of(family)
    request = request_of(guidance_scale=5.0, negative_prompt=negative_prompt)
    held(await pair.sampler.draw(request), by_diffusers(pair.pipeline, request))


@pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
@pytest.mark.parametrize("family", ["lcm", "lcm-sdxl"])
async def test_a_guidance_embedding_equals_diffusers_and_takes_one_row(
    family: str, guidance_scale: float, pair_of: Any
) -> None:
    pair = pair_of(family)
    pair.sampler.rows_of_calls.clear()
    request = request_of(guidance_scale=guidance_scale)
    ours = await pair.sampler.draw(request)
    held(ours, by_diffusers(pair.pipeline, request))
    assert pair.sampler.rows_of_calls == [1] * 4
    other, _ = await pair.sampler.draw(dataclasses.replace(request, guidance_scale=guidance_scale + 2))
    assert np.abs(other - ours[0]).max() > 1e-3, "the UNet does not see the scale"


async def test_size_prompt_and_negative_prompt_of_each_image_stay_its_own_in_a_batch(pair_of: Any) -> None:
    sampler = pair_of("sdxl").sampler
    requests = [
        request_of(seed=1),
        request_of(seed=2, prompt="a blue cat", guidance_scale=5.0),
        request_of(seed=3, guidance_scale=3.0, negative_prompt="green", num_inference_steps=6),
        request_of(seed=4, width=72, height=40, guidance_scale=2.0),
    ]
    alone = [await sampler.draw(request) for request in requests]
    sampler.rows_of_calls.clear()
    loop = sampler.loop()
    together = await asyncio.gather(*(sampler.draw(request, loop) for request in requests))
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()
    # Four rounds of the square ones and of the odd-sized one, then two of the one with six steps.
    assert sampler.rows_of_calls == [5, 2] * 4 + [2] * 2


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 5),
        ({"negative_prompt": "a cat"}, 5),
        ({"negative_prompt": "a cat", "guidance_scale": 5.0}, 7),
        ({"guidance_scale": 5.0}, 5),
        ({"prompt": "cat " * 100}, 14),
    ],
    ids=["a prompt", "a negative prompt that nobody reads", "one that is read", "none", "more than is read"],
)
@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
def test_prompt_tokens_are_those_that_the_text_encoders_read(
    family: str, changes: dict[str, Any], tokens: int, pair_of: Any
) -> None:
    sampler = pair_of(family).sampler
    request = request_of(**{"prompt": "a red rocket on blue", **changes})
    assert sampler.tokenize(texts_of(request, sampler.architecture)).count == tokens
