"""The parts of the flow model: Z-Image's own, and the way they are trained through."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor
from transformers import AutoTokenizer

from captions import caption
from emoji_flow.models import (
    TEXT_WIDTH,
    TOKENS,
    build_text_encoder,
    build_transformer,
    denoise,
    pipeline_of,
    read_tokenizer,
    save_checkpoint,
    states_of,
    tokenize,
    write_tokenizer,
)
from models import build_vae
from world import COLOUR_NAMES, emoji_list

PROMPTS = ["a rocket on a yellow background", "Crème brûlée, 2 of THEM! 🚀", "", "very " * 60, "line\nbreak\t  it's"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return read_tokenizer(folder)


@pytest.fixture(scope="module")
def transformer() -> Any:
    """With weights that let every input through to the answer."""
    torch.manual_seed(0)
    transformer = build_transformer().eval()
    for value in transformer.parameters():
        value.data += 0.05 * torch.randn_like(value)
    return transformer


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_comes_back_from_its_tokens(tokenizer: Any, prompt: str) -> None:
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_tokenized_as_the_pipeline_does_it(folder: Path, tokenizer: Any, prompt: str) -> None:
    ids, mask = tokenize(tokenizer, [prompt], 128)
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0][mask[0]].tolist() == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert set(ids[0][~mask[0]].tolist()) <= {tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_every_name_and_colour_is_few_tokens(tokenizer: Any) -> None:
    names = [name for one in emoji_list() for name in one.names]
    lengths = {word: len(tokenizer(f" {word}")["input_ids"]) for word in [*names, *COLOUR_NAMES]}
    assert all(length <= len(re.split("[ -]", word)) + 1 for word, length in lengths.items()), lengths


def test_captions_take_one_block_of_tokens(tokenizer: Any) -> None:
    random = Random(0)
    texts = [caption(random, one.names, random.choice(COLOUR_NAMES)) for one in emoji_list() for _ in range(10)]
    _, mask = tokenize(tokenizer, texts, 2 * TOKENS)
    assert (mask.sum(1) > TOKENS).float().mean() < 0.01


def test_states_do_not_depend_on_padding(tokenizer: Any) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(len(tokenizer)).eval()
    states: list[Tensor] = []
    for length in (TOKENS, 2 * TOKENS):
        ids, mask = tokenize(tokenizer, PROMPTS[:1], length)
        states.append(states_of(encoder, ids, mask)[mask])
    assert torch.allclose(states[0], states[1], atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (10, 10), (8, 12), (12, 8), (12, 12), (16, 8)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_it_answers_as_diffusers_does(transformer: Any, size: tuple[int, int], blocks: int) -> None:
    torch.manual_seed(1)
    latents, time = torch.randn(3, 16, *size), torch.tensor([0.0, 0.3, 1.0])
    length = blocks * TOKENS
    states = torch.randn(3, length, TEXT_WIDTH)
    mask = torch.arange(length) < torch.tensor([[length], [length - 1], [length - TOKENS + 1]])
    with torch.no_grad():
        own = denoise(transformer, latents, time, states, mask)
        shown = [row[kept] for row, kept in zip(states, mask, strict=True)]
        theirs = transformer(list(latents[:, :, None]), time, shown, return_dict=False)[0]
    assert torch.allclose(own, torch.stack(theirs)[:, :, 0], atol=2e-5)
    assert own.std() > 0.1


def test_the_saved_folder_generates_in_diffusers_what_it_was_trained_for(
    tmp_path: Path, folder: Path, tokenizer: Any, transformer: Any
) -> None:
    torch.manual_seed(0)
    vae = build_vae()
    vae.register_to_config(scaling_factor=0.9, shift_factor=0.01)
    parts = pipeline_of(vae, build_text_encoder(len(tokenizer)), tokenizer, copy.deepcopy(transformer))
    save_checkpoint(parts, folder, tmp_path / "checkpoint")
    pipeline: Any = ZImagePipeline.from_pretrained(tmp_path / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)
    prompts, noise = [PROMPTS[0], "Bee, blue"], torch.randn(2, 16, 8, 8)
    settings = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 1.5, "latents": noise}
    theirs = pipeline(list(prompts), output_type="latent", **settings).images
    ids, mask = tokenize(pipeline.tokenizer, [*prompts, "", ""], TOKENS)
    states, latents, scheduler = states_of(pipeline.text_encoder, ids, mask), noise, pipeline.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    for timestep in scheduler.timesteps:
        time = (1 - timestep / 1000).expand(4)
        with torch.no_grad():
            towards, without = denoise(pipeline.transformer, latents.repeat(2, 1, 1, 1), time, states, mask).chunk(2)
        latents = scheduler.step(-(towards + 1.5 * (towards - without)), timestep, latents).prev_sample
    assert torch.allclose(latents, theirs, atol=1e-3)
    assert (latents - noise).std() > 0.1


def test_a_saved_folder_holds_what_is_shipped(tmp_path: Path, folder: Path, tokenizer: Any) -> None:
    parts = pipeline_of(build_vae(), build_text_encoder(len(tokenizer)), tokenizer, build_transformer())
    save_checkpoint(parts, folder, tmp_path / "checkpoint")
    files = [file for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25_000_000
    assert {file.parent.name for file in files if file.suffix == ".safetensors"} == {
        "transformer",
        "text_encoder",
        "vae",
    }
    index = json.loads((tmp_path / "checkpoint" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "ZImagePipeline"
    assert index["text_encoder"] == ["transformers", "Qwen3Model"]
    assert index["tokenizer"] == ["transformers", "Qwen2Tokenizer"]
    defaults = json.loads((tmp_path / "checkpoint" / "hypergen_defaults.json").read_text(encoding="utf-8"))
    assert all(defaults[name] % 16 == 0 for name in ("min_size", "width", "height", "max_size"))
