from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.conversion.tokenizer import write_tokenizer
from hypergen_export.errors import BrokenCheckpointError
from support.miniature import save_miniature

from ..conftest import edit_json

PROMPTS = [
    "",
    " ",
    "a red rocket",
    "A Red ROCKET",
    "red  blue\tgreen\ncat",
    "rocket " * 50,
    "it's 3.14, isn't it? (yes!) [no]",
    "日本の猫 \U0001f408 café naïve Ångström",
    "<|endoftext|>",
    "red!blue!!",
    "\x00\x01",
]


def write(folder: Path, path: Path) -> None:
    """Write the checkpoint's first tokenizer."""
    checkpoint = open_checkpoint(str(folder))
    write_tokenizer(checkpoint, checkpoint.family.text[0], path)


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"], ids=["as in 1.x", "as in 2.x"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(tmp_path_factory.mktemp("padding"), pad_token=request.param)


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write(folder, path)
    return Tokenizer.from_file(str(path))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_that_diffusers_feeds_its_text_encoder(folder: Path, ours: Tokenizer, prompt: str) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    # As StableDiffusionPipeline.encode_prompt calls it.
    expected = theirs(prompt, padding="max_length", max_length=theirs.model_max_length, truncation=True).input_ids
    assert ours.encode(prompt).ids == expected
    assert len(expected) == 16


def test_a_batch_encodes_as_its_prompts_do(ours: Tokenizer) -> None:
    assert [encoding.ids for encoding in ours.encode_batch(PROMPTS)] == [ours.encode(prompt).ids for prompt in PROMPTS]


def test_padding_is_the_checkpoints(folder: Path, ours: Tokenizer) -> None:
    pad_token = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["pad_token"]
    assert ours.encode("red").ids[-1] == ours.token_to_id(pad_token)


def test_a_broken_tokenizer_is_a_broken_checkpoint(checkpoint_copy: Path, tmp_path: Path) -> None:
    (checkpoint_copy / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(BrokenCheckpointError, match="tokenizer cannot be loaded"):
        write(checkpoint_copy, tmp_path / "tokenizer.json")


def test_two_tokenizers_pad_each_in_its_own_way(tmp_path: Path) -> None:
    folder = save_miniature(tmp_path / "xl", family="sdxl")
    checkpoint = open_checkpoint(str(folder))
    padding = {}
    for text in checkpoint.family.text:
        name = text.tokenizer
        write_tokenizer(checkpoint, text, tmp_path / f"{name}.json")
        ours = Tokenizer.from_file(str(tmp_path / f"{name}.json"))
        theirs = CLIPTokenizer.from_pretrained(folder / name)
        # As StableDiffusionXLPipeline.encode_prompt calls each.
        expected = theirs("a red rocket", padding="max_length", max_length=theirs.model_max_length, truncation=True)
        assert ours.encode("a red rocket").ids == expected.input_ids
        padding[name] = ours.id_to_token(expected.input_ids[-1])
    assert padding == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def refusal(folder: Path, tmp_path: Path) -> str:
    with pytest.raises(BrokenCheckpointError) as caught:
        write(folder, tmp_path / "tokenizer.json")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_without_a_vocabulary_is_refused_in_one_line(checkpoint_copy: Path, tmp_path: Path) -> None:
    """As of T5 and others: transformers would read every prompt alike."""
    folder = checkpoint_copy / "tokenizer"
    for file in ("vocab.json", "merges.txt"):
        (folder / file).rename(folder / f"former-{file}")
    (folder / "spiece.model").write_bytes(b"sentencepiece")
    expected = f"{folder}: has no vocabulary for a CLIPTokenizer (tokenizer.json or vocab.json and merges.txt)"
    assert refusal(checkpoint_copy, tmp_path) == expected


def test_a_vocabulary_of_nothing_is_refused_in_one_line(checkpoint_copy: Path, tmp_path: Path) -> None:
    special = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (checkpoint_copy / "tokenizer" / "vocab.json").write_text(json.dumps(special))
    (checkpoint_copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert "encodes every prompt alike" in refusal(checkpoint_copy, tmp_path)


def test_tokens_that_the_text_encoder_does_not_know_are_refused(checkpoint_copy: Path, tmp_path: Path) -> None:
    edit_json(checkpoint_copy / "text_encoder" / "config.json", vocab_size=500)
    assert "has token ids up to 539, its text encoder takes 500" in refusal(checkpoint_copy, tmp_path)


def test_a_pad_token_of_null_is_refused_in_one_line(checkpoint_copy: Path, tmp_path: Path) -> None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(checkpoint_copy / "tokenizer" / file, pad_token=None)
    assert "its pad_token is null" in refusal(checkpoint_copy, tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_in_place_of_a_vocabulary_is_named(file: str, checkpoint_copy: Path, tmp_path: Path) -> None:
    (checkpoint_copy / "tokenizer" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(checkpoint_copy, tmp_path)
