"""Transformer families: the exporter's tables and the sampler's mathematics in torch, compared with diffusers.

Both sides use miniatures with the same weights, prompt, seed and scheduler, in float32. Engines are compared with torch
in tests/export, and the whole server with diffusers in tests/end_to_end.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaSprintImg2ImgPipeline

from hypergen_sampler.predicted_x0 import predicted_x0
from hypergen_sampler.request import InvalidInputError
from support.parity import Pair, held, input_image, mask, request_of, sampler_of
from support.pipelines import pipeline_of
from support.transformer_miniatures import MINIATURES, save_transformer_miniature
from support.transformer_pipelines import FROM_IMAGE, image_by_diffusers, pipeline_from_image

pytestmark = pytest.mark.claim("families")

# Relative to the largest latent. The rotations are real here and complex in some of diffusers' attention processors.
TOLERANCE = 1e-5
# From an input image, the VAE's encoder adds its rounding, which the guidance scale multiplies.
TOLERANCE_FROM_IMAGE = 5e-5
# Family -> a guidance scale that guides, and one that does not (none of FLUX.1-dev's is the identity).
SCALES = {
    "flux1-dev": (3.5, 1.0),
    "flux1-kontext": (2.5, 1.0),
    "flux1-schnell": (1.0, 1.0),
    "chroma": (3.5, 1.0),
    "flux2-klein": (1.0, 1.0),
    "flux2-klein-base": (3.5, 1.0),
    "stable-diffusion-3": (3.5, 1.0),
    "stable-diffusion-3-without-t5": (3.5, 1.0),
    "z-image": (3.5, 0.0),
    "qwen-image": (3.5, 1.0),
    "sana": (3.5, 1.0),
    "sana-1.5": (3.5, 1.0),
    "sana-sprint": (4.5, 1.0),
}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> our sampler and diffusers' pipeline of its miniature."""

    @functools.cache
    def make(family: str) -> Pair:
        folder = save_transformer_miniature(tmp_path_factory.mktemp("transformers") / family, family)
        return Pair(sampler_of(folder), pipeline_of(folder))

    return make


@pytest.mark.parametrize("family", MINIATURES)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "not guided"])
async def test_an_image_equals_the_one_of_diffusers(family: str, guided: bool, pair_of: Any) -> None:
    pair = pair_of(family)
    scale = SCALES[family][0 if guided else 1]
    request = request_of(width=96, height=64, guidance_scale=scale, num_inference_steps=4)
    held(await pair.sampler.generate(request), image_by_diffusers(pair.pipeline, request), TOLERANCE)


@pytest.mark.parametrize("family", MINIATURES)
async def test_images_of_other_prompts_seeds_steps_and_scales_share_calls(family: str, pair_of: Any) -> None:
    pair = pair_of(family)
    guided, unguided = SCALES[family]
    requests = [
        request_of(width=64, height=64, num_inference_steps=3, guidance_scale=guided),
        request_of(width=64, height=64, num_inference_steps=5, guidance_scale=unguided, seed=5, prompt="a cat"),
    ]
    loop = pair.sampler.loop()
    pair.sampler.rows_of_calls.clear()
    results = await asyncio.gather(*(pair.sampler.generate(request, loop) for request in requests))
    rows = 2 if pair.sampler.architecture.guides(requests[0]) else 1
    assert Counter(pair.sampler.rows_of_calls) == Counter({rows + 1: 3, 1: 2})
    for ours, request in zip(results, requests, strict=True):
        held(ours, image_by_diffusers(pair.pipeline, request), TOLERANCE)


@pytest.mark.parametrize("family", MINIATURES)
async def test_a_larger_image_has_the_schedule_of_its_size(family: str, pair_of: Any) -> None:
    pair = pair_of(family)
    request = request_of(width=192, height=256, num_inference_steps=2, guidance_scale=SCALES[family][0])
    held(await pair.sampler.generate(request), image_by_diffusers(pair.pipeline, request), TOLERANCE)


@pytest.mark.parametrize("family", FROM_IMAGE)
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
# 0.6 of 6 steps are 4, as flow matching rounds the first step down; 0.7 of 5 are 4.
@pytest.mark.parametrize(("steps", "strength"), [(6, 0.6), (5, 0.7), (4, 1.0)])
async def test_an_image_from_an_image_equals_the_one_of_diffusers(
    family: str, masked: bool, steps: int, strength: float, pair_of: Any
) -> None:
    pair = pair_of(family)
    request = request_of(
        guidance_scale=SCALES[family][0],
        num_inference_steps=steps,
        strength=strength,
        image=input_image(),
        mask=mask() if masked else None,
    )
    pipeline = pipeline_from_image(family, pair.pipeline, masked=masked)
    held(await pair.sampler.generate(request), image_by_diffusers(pipeline, request), TOLERANCE_FROM_IMAGE)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("flux1-kontext", [(96, 64)]),
        ("flux2-klein", [(96, 64)]),
        ("flux2-klein", [(96, 64), (64, 80)]),
        ("flux2-klein-base", [(96, 64), (64, 80)]),
    ],
)
async def test_an_image_with_references_equals_the_one_of_diffusers(
    family: str, sizes: list[tuple[int, int]], pair_of: Any
) -> None:
    pair = pair_of(family)
    references = tuple(input_image(*size) for size in sizes)
    request = request_of(width=80, height=96, references=references, guidance_scale=SCALES[family][0])
    held(await pair.sampler.generate(request), image_by_diffusers(pair.pipeline, request), TOLERANCE_FROM_IMAGE)


async def test_images_share_calls_if_their_references_have_as_many_tokens(pair_of: Any) -> None:
    """What is seen at each token is the image's own."""
    pair = pair_of("flux2-klein")
    references = [(), (input_image(96, 64),), (input_image(64, 96)[::-1].copy(),), (input_image(64, 64),) * 2]
    requests = [
        request_of(references=images, num_inference_steps=steps, seed=steps)
        for images, steps in zip(references, (3, 4, 5, 6), strict=True)
    ]
    loop = pair.sampler.loop()
    pair.sampler.rows_of_calls.clear()
    results = await asyncio.gather(*(pair.sampler.generate(request, loop) for request in requests))
    assert Counter(pair.sampler.rows_of_calls) == Counter({2: 4, 1: 3 + 1 + 6})
    pair.sampler.rows_of_calls.clear()
    narrow = replace(pair.sampler, architecture=replace(pair.sampler.architecture, max_reference_rows=1))
    await asyncio.gather(*(narrow.generate(request, loop) for request in requests[1:3]))
    assert Counter(pair.sampler.rows_of_calls) == Counter({1: 4 + 5})
    for ours, request in zip(results, requests, strict=True):
        held(ours, image_by_diffusers(pair.pipeline, request), TOLERANCE_FROM_IMAGE)


@pytest.mark.parametrize(
    ("family", "steps", "strength", "references"),
    [
        ("flux1-kontext", 6, 0.6, ()),
        ("flux1-kontext", 4, 1.0, (input_image(80, 64),)),  # it is seen in place of the inpainted one
        ("flux2-klein", 6, 0.6, ()),
        ("flux2-klein", 4, 1.0, (input_image(80, 64),)),
    ],
)
async def test_an_inpainted_image_is_seen_as_diffusers_shows_it(
    family: str, steps: int, strength: float, references: tuple[Any, ...], pair_of: Any
) -> None:
    pair = pair_of(family)
    request = request_of(
        guidance_scale=SCALES[family][0],
        num_inference_steps=steps,
        strength=strength,
        image=input_image(),
        mask=mask(),
        references=references,
    )
    pipeline = pipeline_from_image(family, pair.pipeline, masked=True)
    held(await pair.sampler.generate(request), image_by_diffusers(pipeline, request), TOLERANCE_FROM_IMAGE)


@pytest.mark.parametrize(
    "prompts",
    [
        {"prompt": " A RED Rocket\n", "negative_prompt": "Blue CATS "},
        {"prompt": "a red rocket, " * 200, "negative_prompt": "blue " * 400},
        {"prompt": "", "negative_prompt": ""},
    ],
    ids=["in capitals", "too long", "empty"],
)
async def test_sanas_instruction_is_before_the_prompt_alone(prompts: dict[str, str], pair_of: Any) -> None:
    pair = pair_of("sana-1.5")
    request = request_of(guidance_scale=3.5, **prompts)
    held(await pair.sampler.generate(request), image_by_diffusers(pair.pipeline, request), TOLERANCE)


def test_tokens_are_counted_without_sanas_instruction(pair_of: Any) -> None:
    tokenize = pair_of("sana-1.5").sampler.tokenize
    tokens = [tokenize([text]) for text in ("a red rocket", "a red rocket " * 200)]
    assert [(each.count, each.cut) for each in tokens] == [(3, 0), (299, 301)]
    negative = tokenize(["a red rocket " * 200, ""])
    assert (negative.count, negative.cut) == (299, 301)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "euler"])
async def test_sanas_schedulers_are_those_of_diffusers_with_its_flow(name: str, pair_of: Any) -> None:
    pair = pair_of("sana-1.5")
    assert set(pair.sampler.schedulers.names) == {"", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "euler"}
    request = request_of(num_inference_steps=6, guidance_scale=3.5, scheduler=name)
    pair.choose(name)
    if name == "euler":
        pair.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = image_by_diffusers(pair.pipeline, request)
    pair.choose("")
    held(await pair.sampler.generate(request), theirs, TOLERANCE)


@pytest.mark.parametrize(("option", "value"), [("timestep_spacing", "trailing"), ("sigmas", "karras")])
async def test_the_flow_of_a_solver_has_no_other_spacing(option: str, value: str, pair_of: Any) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{option}: must be absent, as the scheduler has no choice of it$"):
        await pair_of("sana-1.5").sampler.generate(request_of(**{option: value}))


@pytest.mark.parametrize(("steps", "strength"), [(6, 0.6), (2, 0.6), (1, 1.0)])
async def test_sprints_image_from_an_image_equals_the_one_of_diffusers(
    steps: int, strength: float, pair_of: Any
) -> None:
    pair = pair_of("sana-sprint")
    request = request_of(guidance_scale=4.5, num_inference_steps=steps, strength=strength, image=input_image())
    pipeline = SanaSprintImg2ImgPipeline(**pair.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    held(await pair.sampler.generate(request), image_by_diffusers(pipeline, request), TOLERANCE_FROM_IMAGE)


@pytest.mark.parametrize("strength", [0.6, 1.0])
async def test_sprint_keeps_what_a_mask_does_not_cover(strength: float, pair_of: Any) -> None:
    sampler = pair_of("sana-sprint").sampler
    request = request_of(num_inference_steps=4, strength=strength, image=input_image(), mask=mask())
    latents, _ = await sampler.generate(request)
    encoded = sampler.run("vae_encoder", image=input_image()[None])["mean"][0]
    covered = mask()[::32, ::32] >= 128
    assert (latents[:, ~covered] == encoded[:, ~covered]).all()
    assert np.abs(latents[:, covered] - encoded[:, covered]).mean() > 0.1


def test_the_preview_of_each_of_sprints_steps_would_be_the_image(pair_of: Any) -> None:
    """From the exact velocity, although every step adds other noise."""
    scheduler = pair_of("sana-sprint").sampler.schedulers.make("", steps=4)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(1)
    image, latents = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for angle, timestep in zip(scheduler.angles[:-1], scheduler.timesteps, strict=True):
        noise = (latents - torch.cos(angle) * image) / torch.sin(angle)
        step = scheduler.step(noise - image, timestep, latents, generator)
        np.testing.assert_allclose(predicted_x0(scheduler, step, timestep, noise, latents), image, atol=1e-5)
        latents = step.prev_sample
    np.testing.assert_allclose(latents, image, atol=1e-5)


async def test_skip_layer_guidance_equals_that_of_diffusers_beside_images_without_it(pair_of: Any) -> None:
    pair = pair_of("stable-diffusion-3")
    guided = request_of(num_inference_steps=5, guidance_scale=3.5)
    requests = [
        replace(guided, skip_layer_guidance_scale=2.8, skip_layer_guidance_stop=0.6),  # in steps 1 and 2
        replace(guided, seed=3, skip_layer_guidance_scale=1.5, skip_layer_guidance_start=0.5, negative_prompt="a cat"),
        replace(guided, seed=4, num_inference_steps=3),
        replace(guided, seed=5, num_inference_steps=2, guidance_scale=1.0),
    ]
    requests[1] = replace(requests[1], skip_layer_guidance_stop=1.0)  # in steps 3 and 4
    loop = pair.sampler.loop()
    pair.sampler.rows_of_calls.clear()
    results = await asyncio.gather(*(pair.sampler.generate(request, loop) for request in requests))
    assert pair.sampler.rows_of_calls == [2 + 2 + 2 + 1, 3 + 2 + 2 + 1, 3 + 2 + 2, 2 + 3, 2 + 3]
    for ours, request in zip(results, requests, strict=True):
        held(ours, image_by_diffusers(pair.pipeline, request), TOLERANCE)
    plain = await pair.sampler.generate(guided)
    assert np.abs(results[0][1].astype(int) - plain[1].astype(int)).mean() > 1, "it changes nothing"


async def test_skip_layer_guidance_without_guidance_is_refused(pair_of: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^skip_layer_guidance_scale: must be absent or 0 without"):
        await pair_of("stable-diffusion-3").sampler.generate(request_of(skip_layer_guidance_scale=2.8))


async def test_a_model_without_guidance_refuses_a_scale(pair_of: Any) -> None:
    pair = pair_of("flux2-klein")
    with pytest.raises(InvalidInputError, match=r"^guidance_scale: must be absent or 1"):
        await pair.sampler.generate(request_of(guidance_scale=3.5))


@pytest.mark.parametrize("family", [family for family in MINIATURES if family != "sana-sprint"])
def test_the_preview_of_the_last_step_would_be_the_image(family: str, pair_of: Any) -> None:
    """The flow's estimate of the final latents, from the exact velocity, is the image from the first step on."""
    schedulers = pair_of(family).sampler.schedulers
    scheduler = schedulers.make("", steps=5, image_tokens=16)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(1)
    image, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    last = 1 - scheduler.sigmas[0]  # not 0 where solvers divide by it
    latents = last * image + (1 - last) * noise
    for timestep in scheduler.timesteps:
        velocity = noise - image
        step = scheduler.step(velocity, timestep, latents)
        np.testing.assert_allclose(predicted_x0(scheduler, step, timestep, velocity, latents), image, atol=1e-5)
        latents = step.prev_sample
    np.testing.assert_allclose(latents, image, atol=1e-5)
