"""The exporter's tables and the sampler's mathematics in torch, compared with diffusers' pipeline of each family.

Both sides use the same weights, prompt, seed and scheduler, in float32. Engines are compared with torch in
tests/export, and the whole server with diffusers in tests/end_to_end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image as PILImage

from hypergen_sampler.conditioning import texts_of
from hypergen_sampler.request import InvalidInputError, Request
from support.guidance_interval import guided_steps
from support.miniature import EDITING_FAMILIES, FAMILIES, save_miniature, save_tiny_vae
from support.parity import (
    PROMPT,
    TOLERANCE_FROM_IMAGE,
    Pair,
    Sampler,
    by_diffusers,
    held,
    held_from_image,
    input_image,
    mask,
    request_of,
    sampler_of,
)
from support.pipelines import pipeline_of
from support.scheduler_tables import CLASSES

pytestmark = pytest.mark.claim("families")

NEGATIVES = {"no negative": None, "an empty one": "", "a negative": "a green cat"}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> our sampler and diffusers' pipeline of its miniature."""

    @functools.cache
    def make(family: str) -> Pair:
        folder = save_miniature(tmp_path_factory.mktemp("families") / family, family=family)
        return Pair(sampler_of(folder), pipeline_of(folder))

    return make


@pytest.fixture(scope="module")
def with_tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> as `pair_of`, with an AutoencoderTiny."""

    @functools.cache
    def make(family: str) -> Pair:
        folder = save_miniature(tmp_path_factory.mktemp("tiny") / family, family=family)
        shutil.rmtree(folder / "vae")
        save_tiny_vae(folder / "vae")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
        return Pair(sampler_of(folder), pipeline_of(folder))

    return make


async def assert_equal_together_and_alone(sampler: Sampler, requests: Sequence[Request]) -> None:
    """Generated in one loop, images equal those generated alone; only the calls made together are left noted."""
    alone = [await sampler.generate(request) for request in requests]
    sampler.rows_of_calls.clear()
    sampler.models_of_calls.clear()
    loop = sampler.loop()
    together = await asyncio.gather(*(sampler.generate(request, loop) for request in requests))
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_familys_image_equals_the_one_of_diffusers_pipeline(family: str, pair_of: Any) -> None:
    pair = pair_of(family)
    request = request_of(width=72, height=56)
    pair.choose("")
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))
    assert set(pair.sampler.rows_of_calls) == {1}


@pytest.mark.parametrize("negative_prompt", NEGATIVES.values(), ids=NEGATIVES.keys())
@pytest.mark.parametrize("family", ["sd-2", "sdxl", "sdxl-turbo"])
async def test_guidance_equals_that_of_diffusers_pipeline(
    family: str, negative_prompt: str | None, pair_of: Any
) -> None:
    pair = pair_of(family)
    request = request_of(guidance_scale=5.0, negative_prompt=negative_prompt)
    pair.choose("")
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.2, 0.8), (0.5, 1.0), (0.4, 0.4)], ids=str)
@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
async def test_guidance_in_an_interval_equals_diffusers_and_takes_two_rows_there_alone(
    family: str, interval: tuple[float, float], pair_of: Any
) -> None:
    pair = pair_of(family)
    fields: dict[str, Any] = {"guidance_scale": 5.0, "negative_prompt": "a green cat", "num_inference_steps": 6}
    request = request_of(**fields, scheduler="euler", guidance_start=interval[0], guidance_end=interval[1])
    pair.sampler.rows_of_calls.clear()
    ours = await pair.sampler.generate(request)
    pair.choose("euler")
    held(ours, by_diffusers(pair.pipeline, request))
    guided = guided_steps(6, *interval)
    assert pair.sampler.rows_of_calls == [2 if step in guided else 1 for step in range(6)]


@pytest.mark.parametrize("scheduler", sorted(CLASSES))
async def test_every_scheduler_goes_on_where_guidance_begins_and_ends(scheduler: str, pair_of: Any) -> None:
    """Some remember the guided and unguided outputs of earlier steps; some take more steps than were asked for."""
    pair = pair_of("sd-1")
    request = request_of(
        scheduler=scheduler, guidance_scale=5.0, guidance_start=0.3, guidance_end=0.7, num_inference_steps=7
    )
    pair.choose(scheduler)
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


async def test_images_guided_in_other_steps_share_batches_and_stay_their_own(pair_of: Any) -> None:
    sampler = pair_of("sd-1").sampler
    intervals = [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]
    requests = [
        request_of(seed=seed, scheduler="ddim", guidance_scale=5.0, guidance_start=start, guidance_end=end)
        for seed, (start, end) in enumerate(intervals)
    ]
    await assert_equal_together_and_alone(sampler, requests)
    assert sampler.rows_of_calls == [6, 7, 7, 6]


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("family", ["sd-1", "sd-2", "sdxl", "lcm", "lcm-sdxl"])
async def test_deep_features_are_reused_as_in_deep_cache(family: str, interval: int, pair_of: Any) -> None:
    pair = pair_of(family)
    scheduler = "lcm" if family.startswith("lcm") else "euler"
    request = request_of(
        width=72, height=56, num_inference_steps=7, guidance_scale=3.0, scheduler=scheduler, cache_interval=interval
    )
    pair.choose(scheduler)
    pair.sampler.models_of_calls.clear()
    ours = await pair.sampler.generate(request)
    held(ours, by_diffusers(pair.pipeline, request))
    assert pair.sampler.models_of_calls == ["unet_shallow" if step % interval else "unet" for step in range(7)]
    whole, _ = await pair.sampler.generate(dataclasses.replace(request, cache_interval=1))
    assert np.abs(whole - ours[0]).max() > 1e-3 * np.abs(whole).max(), "nothing is left out"


@pytest.mark.parametrize("scheduler", ["heun", "pndm"])
async def test_features_are_reused_over_calls_of_the_unet_where_a_step_makes_several(
    scheduler: str, pair_of: Any
) -> None:
    pair = pair_of("sd-1")
    request = request_of(scheduler=scheduler, guidance_scale=3.0, cache_interval=3, num_inference_steps=7)
    pair.choose(scheduler)
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


async def test_a_row_without_features_of_its_own_goes_through_the_whole_unet(pair_of: Any) -> None:
    """Guidance begins in a step that would reuse features: the negative prompt has none yet. Ending, it leaves them."""
    sampler = pair_of("sd-1").sampler
    fields: dict[str, Any] = {"scheduler": "ddim", "guidance_scale": 5.0, "num_inference_steps": 8, "cache_interval": 4}
    sampler.rows_of_calls.clear()
    sampler.models_of_calls.clear()
    await sampler.generate(request_of(**fields, guidance_start=0.25, guidance_end=0.75))
    deep, shallow = "unet", "unet_shallow"
    assert sampler.rows_of_calls == [1, 1, 2, 2, 2, 2, 1, 1]
    assert sampler.models_of_calls == [deep, shallow, deep, shallow, deep, shallow, shallow, shallow]


async def test_images_that_reuse_features_share_batches_with_those_that_do_not(pair_of: Any) -> None:
    sampler = pair_of("sd-1").sampler
    requests = [
        request_of(seed=seed, scheduler="ddim", guidance_scale=5.0, cache_interval=interval)
        for seed, interval in enumerate([1, 2, 2, 3])
    ]
    await assert_equal_together_and_alone(sampler, requests)
    calls = Counter(zip(sampler.models_of_calls, sampler.rows_of_calls, strict=True))
    deep, shallow = "unet", "unet_shallow"
    rounds = [(deep, 8), (deep, 2), (shallow, 6), (deep, 6), (shallow, 2), (deep, 4), (shallow, 4)]
    assert calls == Counter(rounds), "those of a round run side by side"


@pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
@pytest.mark.parametrize("family", ["lcm", "lcm-sdxl"])
async def test_a_guidance_embedding_equals_diffusers_and_takes_one_row(
    family: str, guidance_scale: float, pair_of: Any
) -> None:
    pair = pair_of(family)
    pair.sampler.rows_of_calls.clear()
    request = request_of(guidance_scale=guidance_scale)
    pair.choose("")
    ours = await pair.sampler.generate(request)
    held(ours, by_diffusers(pair.pipeline, request))
    assert pair.sampler.rows_of_calls == [1] * 4
    other, _ = await pair.sampler.generate(dataclasses.replace(request, guidance_scale=guidance_scale + 2))
    assert np.abs(other - ours[0]).max() > 1e-3, "the UNet does not see the scale"


async def test_size_prompt_and_negative_prompt_of_each_image_stay_its_own_in_a_batch(pair_of: Any) -> None:
    sampler = pair_of("sdxl").sampler
    requests = [
        request_of(seed=1),
        request_of(seed=2, prompt="a blue cat", guidance_scale=5.0),
        request_of(seed=3, guidance_scale=3.0, negative_prompt="green", num_inference_steps=6),
        request_of(seed=4, width=72, height=40, guidance_scale=2.0),
    ]
    await assert_equal_together_and_alone(sampler, requests)
    # Four rounds of the square ones beside the odd-sized one, then two of the one with six steps.
    assert Counter(sampler.rows_of_calls) == Counter([5, 2] * 4 + [2] * 2)


@pytest.mark.parametrize(("guidance_scale", "strength"), [(1.0, 0.3), (1.0, 1.0), (6.0, 0.8)])
@pytest.mark.parametrize("scheduler", sorted(CLASSES))
async def test_an_image_to_start_from_is_met_as_by_diffusers(
    scheduler: str, guidance_scale: float, strength: float, pair_of: Any
) -> None:
    request = request_of(
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        strength=strength,
        num_inference_steps=6,
        image=input_image(),
    )
    await held_from_image(pair_of("sd-1"), request)


@pytest.mark.parametrize(("guidance_scale", "strength"), [(1.0, 0.7), (6.0, 1.0)])
@pytest.mark.parametrize("scheduler", sorted(CLASSES))
async def test_a_mask_is_met_as_by_diffusers(
    scheduler: str, guidance_scale: float, strength: float, pair_of: Any
) -> None:
    request = request_of(
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        strength=strength,
        num_inference_steps=6,
        image=input_image(),
        mask=mask(),
    )
    await held_from_image(pair_of("sd-1"), request)


@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "sd-1"])
async def test_every_family_starts_from_an_image_as_its_pipeline_does(family: str, masked: bool, pair_of: Any) -> None:
    request = request_of(
        width=72,
        height=56,
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=3.0,
        negative_prompt=None if family == "lcm" else "a green cat",
        image=input_image(72, 56),
        mask=mask(72, 56) if masked else None,
    )
    await held_from_image(pair_of(family), request)


@pytest.mark.parametrize("start", ["noise", "an image", "an image and a mask"])
@pytest.mark.parametrize("family", ["sd-1", "sdxl-inpainting"])
async def test_a_tiny_autoencoder_takes_the_place_of_the_vae(family: str, start: str, with_tiny_vae: Any) -> None:
    pair = with_tiny_vae(family)
    given = {"image": input_image(), "strength": 0.6} if start != "noise" else {}
    masked = {"mask": mask()} if start.endswith("mask") else {}
    request = request_of(scheduler="euler_a", guidance_scale=3.0, negative_prompt="a cat", **given, **masked)
    if given:
        await held_from_image(pair, request)
    else:
        pair.choose("euler_a")
        held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 7.5, "image_guidance_scale": 1.5, "negative_prompt": "a green cat"},
        {"guidance_scale": 3.0, "image_guidance_scale": 1.0, "width": 72, "height": 56},
        {"guidance_scale": 1.0, "image_guidance_scale": 1.5},
    ],
    ids=["both scales", "no guidance by the image, another size", "no guidance"],
)
@pytest.mark.parametrize("family", EDITING_FAMILIES)
async def test_an_edit_by_instruction_equals_diffusers(family: str, changes: dict[str, Any], pair_of: Any) -> None:
    pair = pair_of(family)
    image = input_image(changes.get("width", 64), changes.get("height", 64))
    request = request_of(**changes, image=image)
    pair.sampler.rows_of_calls.clear()
    ours = await pair.sampler.generate(request)
    held(ours, by_diffusers(pair.pipeline, request), TOLERANCE_FROM_IMAGE)
    assert set(pair.sampler.rows_of_calls) == {3 if request.guidance_scale > 1 else 1}
    other, _ = await pair.sampler.generate(dataclasses.replace(request, image=image[::-1].copy()))
    assert np.abs(other - ours[0]).max() > 1e-3, "the UNet does not see the image"


async def test_edits_by_instruction_share_batches_and_stay_their_own(pair_of: Any) -> None:
    sampler = pair_of("instruct-pix2pix").sampler
    requests = [
        request_of(seed=seed, guidance_scale=scale, image_guidance_scale=1.5, guidance_end=end, image=image)
        for seed, (scale, end, image) in enumerate(
            [
                (5.0, 1.0, input_image()),
                (1.0, 1.0, input_image()[::-1].copy()),
                (3.0, 0.5, input_image()[:, ::-1].copy()),
            ]
        )
    ]
    await assert_equal_together_and_alone(sampler, requests)
    assert sampler.rows_of_calls == [7, 7, 5, 5]


async def test_a_model_that_edits_needs_an_image(pair_of: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^image: must be given, as this model edits images"):
        await pair_of("instruct-pix2pix").sampler.generate(request_of(image_guidance_scale=1.5))


async def test_images_of_one_request_are_those_of_its_seeds_in_a_row(pair_of: Any) -> None:
    pair = pair_of("sd-1")
    pipeline = StableDiffusionImg2ImgPipeline(**pair.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    pair.choose("euler_a", pipeline)
    theirs = pipeline(
        PROMPT,
        image=PILImage.fromarray(input_image()),
        num_images_per_prompt=3,
        num_inference_steps=4,
        strength=0.8,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (20, 21, 22)],
        output_type="latent",
    ).images.numpy()
    fields = {"scheduler": "euler_a", "strength": 0.8, "image": input_image()}
    for index in range(3):
        ours, _ = await pair.sampler.generate(request_of(**fields, seed=20 + index))
        assert np.abs(ours - theirs[index]).max() <= TOLERANCE_FROM_IMAGE * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("lcm", {"strength": 0.05}, "strength: must be large enough for 4 steps, not 0.05"),
        ("lcm", {"strength": 0.8, "num_inference_steps": 60}, "num_inference_steps: the scheduler refuses 60"),
    ],
)
async def test_a_strength_that_leaves_too_few_steps_is_named(
    family: str, changes: dict[str, Any], words: str, pair_of: Any
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        await pair_of(family).sampler.generate(request_of(image=input_image(), **changes))


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 5),
        ({"negative_prompt": "a cat"}, 5),
        ({"negative_prompt": "a cat", "guidance_scale": 5.0}, 7),
        ({"guidance_scale": 5.0}, 5),
        ({"prompt": "cat " * 100}, 100),
        ({"prompt": "cat " * 300}, 16 * 14),
    ],
    ids=[
        "a prompt",
        "a negative prompt that nobody reads",
        "one that is read",
        "none",
        "several chunks",
        "more than is read",
    ],
)
@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
def test_prompt_tokens_are_those_that_the_text_encoders_read(
    family: str, changes: dict[str, Any], tokens: int, pair_of: Any
) -> None:
    sampler = pair_of(family).sampler
    request = request_of(**{"prompt": "a red rocket on blue", **changes})
    assert sampler.tokenize(texts_of(request, sampler.architecture)).count == tokens


@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        ({}, 0),
        ({"prompt": "cat " * 224}, 0),
        ({"prompt": "cat " * 225}, 1),
        ({"prompt": "cat " * 300, "negative_prompt": "cat " * 230}, 76),
        ({"prompt": "cat " * 300, "negative_prompt": "cat " * 230, "guidance_scale": 5.0}, 76 + 6),
    ],
)
@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
def test_tokens_beyond_what_the_text_encoders_read_are_counted(
    family: str, changes: dict[str, Any], cut: int, pair_of: Any
) -> None:
    sampler = pair_of(family).sampler
    request = request_of(**{"prompt": "a red rocket on blue", **changes})
    assert sampler.tokenize(texts_of(request, sampler.architecture)).cut == cut
