"""Textual inversions, in checkpoints that diffusers saved and in files, compared with its pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.checkpoints.embeddings import Embedding, read_embeddings
from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.conversion.embeddings import vectors_of
from hypergen_export.errors import BadEmbeddingError, BadOptionError, ExportError
from hypergen_export.repository.export import export
from hypergen_export.repository.request import ExportRequest
from support.chunks import ByChunks
from support.loras import lora_weights, save_by_kohya
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


def noise(vectors: int, width: int) -> torch.Tensor:
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(vectors + width))


def save_embeddings(folder: Path) -> dict[str, torch.Tensor]:
    """Files of every format for one text encoder; returns the vectors by name."""
    found = {"webui-pt": noise(3, 32), "webui": noise(2, 32), "Diffusers": noise(1, 32), "pickled": noise(2, 32)}
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": found["webui-pt"]}, "name": "x", "step": 100},
        folder / "webui-pt.pt",
    )
    save_file({"emb_params": found["webui"]}, folder / "webui.safetensors")
    save_file({"<learnt>": found["Diffusers"][0]}, folder / "Diffusers.safetensors")
    torch.save({"<learnt>": found["pickled"]}, folder / "pickled.bin")
    return found


async def test_files_of_every_format_are_read_as_by_diffusers(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint_of("sd-1")
    vectors = save_embeddings(tmp_path)
    sampler = sampler_of(folder, read_embeddings([], tmp_path))
    pipeline = pipeline_of(folder)
    for name, file in ((embedding.name, embedding.file) for embedding in read_embeddings([], tmp_path)):
        pipeline.load_textual_inversion(str(file), token=name)
        assert pipeline.tokenizer.convert_tokens_to_ids(name) != pipeline.tokenizer.unk_token_id, vectors.keys()
    request = request_of(prompt="a webui-pt, Diffusers cat", negative_prompt="webui pickled red", guidance_scale=5.0)
    ours = await sampler.generate(request)
    held(ours, by_diffusers(pipeline, request))
    other, _ = await sampler.generate(replace(request, prompt="a WEBUI-PT, diffusers cat"))
    assert np.array_equal(other, ours[0]), "CLIP's tokenizers know no case"


async def test_xls_two_text_encoders_have_their_own_vectors(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, file = checkpoint_of("sdxl"), tmp_path / "toy.safetensors"
    vectors = {"clip_l": noise(2, 32), "clip_g": noise(2, 48)}
    save_file(vectors, file)
    pipeline = pipeline_of(folder)
    for key, tokenizer, encoder in (
        ("clip_l", "tokenizer", "text_encoder"),
        ("clip_g", "tokenizer_2", "text_encoder_2"),
    ):
        parts = {"tokenizer": getattr(pipeline, tokenizer), "text_encoder": getattr(pipeline, encoder)}
        pipeline.load_textual_inversion(vectors[key], token="toy", **parts)
    request = request_of(prompt="a red toy on blue", negative_prompt="toy", guidance_scale=5.0)
    held(
        await sampler_of(folder, read_embeddings([str(file)], None)).generate(request), by_diffusers(pipeline, request)
    )


@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
async def test_embeddings_in_a_loras_file_are_read_as_files_of_their_own(
    family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As OneTrainer and kohya's trainers store them; stable-diffusion-webui's loader names the keys."""
    folder, file = checkpoint_of(family), tmp_path / "ink.safetensors"
    save_by_kohya(file, lora_weights(folder, "text_encoder"), 2.0)
    vectors = (
        {"clip_l": noise(3, 32), "clip_g": noise(3, 48)} if family == "sdxl" else {"string_to_param.*": noise(3, 32)}
    )
    bundled = {f"bundle_emb.ink-v1.5.{name}": each for name, each in vectors.items()}
    save_file({**load_file(file), **bundled, "bundle_emb.hat.clip_l": noise(1, 32), **second_of(family)}, file)
    (lora,) = read_loras([f"ink={file}"])
    assert lora.modules == {"text_encoder"}
    embeddings = read_embeddings([], None, [lora, lora])
    assert [each.name for each in embeddings] == ["hat", "ink-v1.5"]
    source = ExportRequest(model=str(folder), output=tmp_path, loras=(lora,), embeddings=embeddings).source
    assert read_embeddings(source["embeddings"], None) == embeddings, "so has a passport's reference"
    pipeline = pipeline_of(folder)
    for name, count in (("ink-v1.5", 3), ("hat", 1)):
        for number, width in (("", 32), ("_2", 48))[: 1 + (family == "sdxl")]:
            parts = {part: getattr(pipeline, part + number) for part in ("tokenizer", "text_encoder")}
            pipeline.load_textual_inversion(noise(count, width), token=name, **parts)
    request = request_of(prompt="a red cat, ink-v1.5", negative_prompt="hat", guidance_scale=5.0)
    held(await sampler_of(folder, embeddings).generate(request), by_diffusers(pipeline, request))


def second_of(family: str) -> dict[str, torch.Tensor]:
    return {"bundle_emb.hat.clip_g": noise(1, 48)} if family == "sdxl" else {}


def test_an_embedding_is_of_the_file_that_has_exactly_its_name(tmp_path: Path) -> None:
    save_file({"bundle_emb.ink.v2.clip_l": noise(1, 32)}, tmp_path / "both.safetensors")
    given = [f"{name}={tmp_path / 'both.safetensors'}" for name in ("ink", "ink.v2")]
    assert [each.is_bundled for each in read_embeddings(given, None)] == [False, True]


def test_a_lora_with_an_embedding_for_a_model_without_is_named_itself(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, file = checkpoint_of("flux1-schnell"), tmp_path / "ink.safetensors"
    sides = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": noise(4, 4) for side in "AB"}
    save_file({**sides, "bundle_emb.hat.clip_l": noise(1, 32)}, file)
    loras = read_loras([f"ink={file}"])
    embeddings = read_embeddings([], None, loras)
    request = ExportRequest(model=str(folder), output=tmp_path / "out", loras=loras, embeddings=embeddings)
    with pytest.raises(BadEmbeddingError, match=r"ink\.safetensors: teaches the word hat, but only models with CLIP"):
        export(request)


@pytest.mark.parametrize(
    ("family", "content", "words"),
    [
        ("sd-1", {"emb_params": noise(2, 48)}, "has vectors of 48 numbers, the model takes 32"),
        ("sd-1", {"clip_l": noise(1, 32), "clip_g": noise(1, 48)}, "has vectors of 32, 48 numbers, the model takes 32"),
        ("sdxl", {"emb_params": noise(2, 32)}, "has vectors of 32 numbers, the model takes 32, 48"),
        ("sd-1", {"emb_params": noise(15, 32)}, "has 15 vectors, more than a prompt's chunk"),
        ("sd-1", {"emb_params": torch.full((1, 32), torch.nan)}, "its vectors are not finite"),
        ("sd-1", {"a": noise(1, 32), "b": noise(1, 32)}, "not a textual inversion of a known format"),
        ("sd-1", {"a": torch.ones(2, 3, 32)}, "not a textual inversion of a known format"),
        ("sd-1", {"emb_params": torch.zeros(0)}, "not a textual inversion of a known format"),
        ("sd-1", {"string_to_param": noise(1, 32)}, "not a textual inversion of a known format"),
    ],
)
def test_a_file_for_another_model_is_one_clear_line(
    family: str, content: dict[str, Any], words: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    save_file(content, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    with pytest.raises(BadEmbeddingError, match=words):
        vectors_of(checkpoint, Embedding(name="x", file=tmp_path / "x.safetensors"))


class Explosive:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_pickles_are_never_run(checkpoint_of: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    torch.save({"string_to_param": Explosive()}, tmp_path / "x.pt")
    with pytest.raises(BadEmbeddingError, match="cannot be read"):
        vectors_of(open_checkpoint(str(checkpoint_of("sd-1"))), Embedding(name="x", file=tmp_path / "x.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (["nowhere.pt"], BadEmbeddingError, "nowhere.pt: no such embedding"),
        (["a b={file}"], BadOptionError, "a name must be one word"),
        (["toy={file}", "TOY={file}"], BadOptionError, "TOY is the name of two files"),
    ],
)
def test_options_that_name_no_embedding_are_refused(
    texts: list[str], error: type[ExportError], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.pt"
    file.touch()
    with pytest.raises(error, match=words):
        read_embeddings([text.format(file=file) for text in texts], None)
    with pytest.raises(BadEmbeddingError, match="no such folder, or no embeddings in it"):
        read_embeddings([], tmp_path / "nowhere")
