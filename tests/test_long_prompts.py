"""Prompts of several chunks, against diffusers' pipelines that are given the joined hidden states of the chunks.

What a chunk is, is in tests/model_repository/test_prompt_chunks.py. Here it is spelled out by hand: 14 tokens of a
miniature's 16 positions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from support.chunks import ByChunks
from support.parity import Pair, by_diffusers, held, request_of, sampler_of
from support.pipelines import pipeline_of

CAT, ROCKET = "cat " * 14, "a red rocket , on blue"
# Prompt -> its chunks.
CHUNKS: Mapping[str, tuple[str, ...]] = {
    "a green cat": ("a green cat",),
    CAT + "red rocket": (CAT, "red rocket"),
    CAT + CAT + ROCKET: (CAT, CAT, ROCKET),
    "cat " * 11 + "red, blue rocket": ("cat " * 11 + "red,", "blue rocket"),
}
SHORT, TWO, THREE, CUT_AT_COMMA = CHUNKS


@pytest.fixture(scope="module")
def pair_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Pair]:
    @functools.cache
    def make(family: str) -> Pair:
        folder = checkpoint_of(family)
        return Pair(sampler_of(folder), pipeline_of(folder))

    return make


@pytest.mark.parametrize(
    ("prompt", "negative_prompt"),
    [(TWO, None), (THREE, SHORT), (SHORT, TWO), (CUT_AT_COMMA, THREE)],
    ids=["no negative", "a longer prompt", "a longer negative", "cut at a comma"],
)
@pytest.mark.parametrize("family", ["sd-1", "sd-2", "sdxl"])
async def test_an_image_equals_diffusers_of_the_joined_chunks(
    family: str, prompt: str, negative_prompt: str | None, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(family)
    if negative_prompt is None and family != "sdxl":
        negative_prompt = SHORT
    request = request_of(prompt=prompt, negative_prompt=negative_prompt, guidance_scale=5.0)
    pair.choose("")
    held(await pair.sampler.generate(request), by_diffusers(ByChunks(pair.pipeline, CHUNKS), request))


@pytest.mark.parametrize("family", ["lcm", "sdxl-turbo"])
async def test_a_prompt_alone_is_read_whole(family: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(family)
    request = request_of(prompt=THREE)
    pair.choose("")
    ours = await pair.sampler.generate(request)
    held(ours, by_diffusers(ByChunks(pair.pipeline, CHUNKS), request))
    other, _ = await pair.sampler.generate(dataclasses.replace(request, prompt=THREE.replace("blue", "green")))
    assert abs(other - ours[0]).max() > 1e-3, "the last chunk is not read"


async def test_images_share_calls_with_prompts_of_as_many_chunks(pair_of: Callable[[str], Pair]) -> None:
    """Padding one image's prompt for the sake of another's would change the image."""
    sampler = pair_of("sd-1").sampler
    requests = [
        request_of(prompt=prompt, negative_prompt=SHORT, guidance_scale=5.0, seed=seed, scheduler="ddim")
        for seed, prompt in enumerate([SHORT, TWO, CUT_AT_COMMA, THREE])
    ]
    alone = [await sampler.generate(request) for request in requests]
    sampler.rows_of_calls.clear()
    loop = sampler.loop()
    together = await asyncio.gather(*(sampler.generate(request, loop) for request in requests))
    assert Counter(sampler.rows_of_calls) == Counter([2, 4, 2] * requests[0].num_inference_steps)
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert abs(one - other).max() <= 1e-4 * abs(one).max()
