"""Checkpoints that diffusers saved with textual inversion concepts, compared with its pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.chunks import ByChunks
from support.miniature import save_miniature
from support.parity import Pair, by_diffusers, held, request_of, sampler_of
from support.pipelines import pipeline_of

VECTORS = {"<toy>": 3, "<hat>": 1, "<toy-cat>": 2}
PROMPTS = {
    "several vectors": "a <toy> on a blue background",
    "one vector": "a red <hat>",
    "several concepts": "a <toy-cat>, a <hat>, <toy> <toy>",
    "one of its tokens": "a <toy>_1 cat",
    "none": "a red rocket",
    "longer than a chunk": "cat " * 13 + "<toy> red",
}
CHUNKS = {prompt: (prompt,) for prompt in (*PROMPTS.values(), "a red rocket on a blue background")} | {
    PROMPTS["longer than a chunk"]: ("cat " * 13 + "<toy>", "<toy>_1 <toy>_2 red")
}


def with_concepts(folder: Path, family: str) -> Path:
    """A miniature that has learnt VECTORS, saved by diffusers."""
    pipeline = pipeline_of(save_miniature(folder / "plain", family=family))
    parts = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    for tokenizer, encoder in parts[: 2 if family == "sdxl" else 1]:
        model = getattr(pipeline, encoder)
        for token, vectors in VECTORS.items():
            noise = torch.randn(vectors, model.config.hidden_size, generator=torch.Generator().manual_seed(vectors))
            pipeline.load_textual_inversion(
                noise, token=token, tokenizer=getattr(pipeline, tokenizer), text_encoder=model
            )
    pipeline.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module", params=["sd-1", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = with_concepts(tmp_path_factory.mktemp("concepts"), request.param)
    return Pair(sampler_of(folder), pipeline_of(folder))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
async def test_a_concept_of_several_vectors_is_read_in_full_in_a_prompt(prompt: str, pair: Pair) -> None:
    request = request_of(prompt=prompt)
    held(await pair.sampler.generate(request), by_diffusers(ByChunks(pair.pipeline, CHUNKS), request))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
async def test_a_concept_of_several_vectors_is_read_in_full_in_a_negative_prompt(prompt: str, pair: Pair) -> None:
    request = request_of(negative_prompt=prompt, guidance_scale=5.0)
    held(await pair.sampler.generate(request), by_diffusers(ByChunks(pair.pipeline, CHUNKS), request))
