"""The shipped folder: a diffusers checkpoint that is small enough for git."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from world import COLOUR_NAMES, emoji_list

CHECKPOINT = Path(__file__).parents[3] / "export" / "emoji" / "checkpoint"
PROMPTS = ["a rocket on a yellow background", "Crème brûlée, 2 of THEM!", "", "very " * 60]


def read(name: str) -> Any:
    return json.loads((CHECKPOINT / name).read_text(encoding="utf-8"))


def test_it_is_smaller_than_25_megabytes() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 25_000_000


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_the_weights_are_in_half_precision(name: str) -> None:
    with safe_open(CHECKPOINT / f"{name}.safetensors", "pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert "F16" in kinds
    assert not kinds & {"F32", "BF16", "F64"}


def test_the_stored_defaults_are_legal_sizes() -> None:
    defaults = read("hypergen_defaults.json")
    assert defaults["min_size"] <= defaults["width"] == defaults["height"] <= defaults["max_size"]
    assert all(defaults[name] % 8 == 0 for name in ("min_size", "width", "height", "max_size"))


def test_there_is_a_suggestion_for_every_emoji() -> None:
    suggestions = read("hypergen_defaults.json")["suggestions"]
    assert [one.partition(" on a")[0] for one in suggestions] == [emoji.name for emoji in emoji_list()]
    assert {one.split()[-2] for one in suggestions} == set(COLOUR_NAMES)


def test_positions_of_tokenizer_and_text_encoder_agree() -> None:
    positions = read("text_encoder/config.json")["max_position_embeddings"]
    assert read("tokenizer/tokenizer_config.json")["model_max_length"] == positions


@pytest.mark.parametrize("prompt", PROMPTS)
def test_all_readers_of_the_tokenizer_see_the_same_tokens(prompt: str) -> None:
    folder = CHECKPOINT / "tokenizer"
    own = CLIPTokenizer.from_pretrained(folder)
    old = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    assert own(prompt)["input_ids"] == old(prompt)["input_ids"] == plain.encode(prompt).ids
