"""Weighted prompts and skipped layers of CLIP, against diffusers' pipelines (`ByWeightedChunks`) and compel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTextModel

from hypergen_sampler.request import InvalidInputError
from support.chunks import ByWeightedChunks, WeightedChunks
from support.miniature import save_miniature
from support.parity import Pair, by_diffusers, held, request_of, sampler_of
from support.pipelines import pipeline_of

# Prompt -> the texts of its chunks, with the weights of the first tokens after the start.
WEIGHTED: WeightedChunks = {
    "red (rocket:1.5) on ((blue)) [cat]": (("red rocket on blue cat", (1.0, 1.5, 1.0, 1.1 * 1.1, 1 / 1.1)),),
    "(red BREAK blue cat:1.3) on": (("red", (1.3,)), ("blue cat on", (1.3, 1.3, 1.0))),
    "cat " * 13 + "(cat rocket:0.4)": (("cat " * 14, (1.0,) * 13 + (0.4,)), ("rocket", (0.4,))),
    "a green cat": (("a green cat", ()),),
}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @functools.cache
    def make(family: str) -> Pair:
        folder = save_miniature(tmp_path_factory.mktemp("weights") / family, family=family)
        _give_a_mean(folder / "text_encoder")
        return Pair(sampler_of(folder), pipeline_of(folder))

    return make


def _give_a_mean(folder: Path) -> None:
    """As a trained text encoder's hidden states have: those of a new one have none that could be restored."""
    model = CLIPTextModel.from_pretrained(folder)
    model.final_layer_norm.bias.data.fill_(0.5)
    model.save_pretrained(folder)


@pytest.mark.parametrize("prompt", [prompt for prompt in WEIGHTED if prompt != "a green cat"], ids=str)
@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
async def test_a_weighted_prompt_equals_diffusers_of_weighted_hidden_states(
    family: str, prompt: str, pair_of: Callable[[str], Pair]
) -> None:
    pair = pair_of(family)
    pair.choose("")
    for positive, negative in ((prompt, "a green cat"), ("a green cat", prompt)):
        request = request_of(
            prompt=positive, negative_prompt=negative, guidance_scale=5.0, prompt_weighting="a1111", clip_skip=1
        )
        held(
            await pair.sampler.generate(request),
            by_diffusers(ByWeightedChunks(pair.pipeline, WEIGHTED, clip_skip=1), request),
        )


@pytest.mark.parametrize(("family", "clip_skip"), [("sd-1", 0), ("sd-1", 1), ("sd-1", 2), ("sd-2", 1), ("sdxl", 1)])
async def test_layers_are_skipped_as_by_diffusers(family: str, clip_skip: int, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(family)
    request = request_of(prompt="a green cat", clip_skip=clip_skip)
    pair.choose("")
    reference = ByWeightedChunks(pair.pipeline, WEIGHTED, clip_skip=clip_skip)
    held(await pair.sampler.generate(request), by_diffusers(reference, request))


async def test_weights_beyond_all_numbers_are_refused(pair_of: Callable[[str], Pair]) -> None:
    request = request_of(prompt="(" * 10_000 + "cat", prompt_weighting="a1111")
    with pytest.raises(InvalidInputError, match=r"^prompt: has weights.* too large"):
        await pair_of("sd-1").sampler.generate(request)


# compel 2.5.1: CompelForSD(pipeline)(COMPEL, negative_prompt="cat-").embeds[0, 1::2, 0], in float32, and CompelForSDXL.
COMPEL = "red rocket++ on (blue (background cat)+)0.6, red. (green cat on background red cat)0.3 blue-"
BY_COMPEL: Mapping[str, tuple[float, ...]] = {
    "sd-1": (
        *(1.8901, 1.3467, 1.1592, 1.1546, -0.2399, 1.0572, 1.2305, 0.8233),
        *(1.5641, 1.7419, 1.5327, 1.293, 1.2753, 0.8056, 1.3483, 1.23),
        *(0.9904, 1.7105, 1.6164, 1.5624, 1.4634, 1.4153, 1.4309, 1.4329),
    ),
    "sdxl": (
        *(0.8231, 0.3903, 0.5887, 0.5158, -0.3419, 0.5256, 0.1036, 0.1488),
        *(1.0112, 1.2319, 1.1979, 1.0892, 1.0768, 0.7012, 1.0597, 0.7041),
        *(0.3568, 0.9843, 1.1076, 1.1578, 1.1732, 1.1809, 1.2218, 1.2608),
    ),
}


@pytest.mark.parametrize("family", BY_COMPEL)
def test_hidden_states_of_compels_syntax_are_compels(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    """Three chunks, with nested weights above and below 1, beside a negative prompt of one chunk."""
    sampler = sampler_of(checkpoint_of(family))
    request = request_of(prompt=COMPEL, negative_prompt="cat-", guidance_scale=5.0, prompt_weighting="compel")
    encoded = sampler.encode(request)
    assert encoded["encoder_hidden_states"].shape[:2] == (2, 3 * 16)
    np.testing.assert_allclose(encoded["encoder_hidden_states"][1, 1::2, 0], BY_COMPEL[family], atol=1e-4)
    if family == "sdxl":
        assert encoded["text_embeds"].shape == (2, 40)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('("a", "b").and()', r"^prompt: has, or its negative prompt has, \.and\(\), which is not supported"),
        ("cat- red " * 65, "^prompt: must have at most 64 parts with weights below 1"),
    ],
)
async def test_what_compel_has_and_we_have_not_is_named(
    prompt: str, words: str, checkpoint_of: Callable[[str], Path]
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        await sampler_of(checkpoint_of("sd-1")).generate(request_of(prompt=prompt, prompt_weighting="compel"))
