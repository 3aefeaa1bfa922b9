"""Token counts and inputs of text encoders whose prompts stand in a template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from hypergen_sampler.prompts import PromptTokenizers
from hypergen_sampler.request import TextInput

WORDS = ["[pad]", "<user>", "<end>", "<assistant>", *(f"w{number}" for number in range(12))]
TEMPLATE = TextInput(
    encoder="text_encoder",
    tokenizer="tokenizer",
    inputs=("input_ids", "attention_mask"),
    outputs=("encoder_hidden_states",),
    segment=0,
    before="<user> ",
    after=" <end> <assistant>",
    is_instruction=False,
    max_chunks=1,
)


def save_tokenizer(folder: Path, name: str, *, length: int, multiple: int | None) -> None:
    """One token for each word; `multiple` pads to multiples of it, else to the length."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(
        length=None if multiple else length, pad_to_multiple_of=multiple, pad_id=0, pad_token="[pad]"
    )
    tokenizer.save(str(folder / f"{name}.json"))


@pytest.fixture
def tokenize(tmp_path: Path) -> PromptTokenizers:
    save_tokenizer(tmp_path, "tokenizer", length=12, multiple=4)
    return PromptTokenizers(tmp_path, [TEMPLATE])


def test_a_template_is_read_but_not_counted(tokenize: PromptTokenizers) -> None:
    tokens = tokenize(["w0 w1"])
    assert tokens.inputs[0]["input_ids"].tolist() == [[1, 4, 5, 2, 3, 0, 0, 0]]
    assert tokens.inputs[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert (tokens.count, tokens.cut) == (2, 0)


def test_texts_of_a_request_are_padded_to_one_length(tokenize: PromptTokenizers) -> None:
    tokens = tokenize(["", "w0 w1 w2 w3"])
    assert tokens.inputs[0]["input_ids"].shape == (2, 8)
    assert tokens.inputs[0]["attention_mask"].sum(axis=1).tolist() == [3, 7]
    assert (tokens.count, tokens.cut) == (4, 0)


@pytest.mark.parametrize(("words", "count", "cut"), [(9, 9, 0), (10, 10, 0), (11, 11, 0), (12, 11, 1)])
def test_the_end_of_a_template_is_cut_before_the_prompt(
    tokenize: PromptTokenizers, words: int, count: int, cut: int
) -> None:
    tokens = tokenize([" ".join(WORDS[4 : 4 + words])])
    assert tokens.inputs[0]["input_ids"].shape == (1, 12)
    assert (tokens.count, tokens.cut) == (count, cut)


@pytest.fixture
def tokenize_after_instruction(tmp_path: Path) -> PromptTokenizers:
    """The instruction are three tokens after the start; the denoiser is given five: those from its last one on."""
    save_tokenizer(tmp_path, "tokenizer", length=7, multiple=None)
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(single="<user> $0", special_tokens=[("<user>", 1)])
    tokenizer.save(str(file))
    return PromptTokenizers(tmp_path, [replace(TEMPLATE, before="w9 w8 w7 ", after="", is_instruction=True)])


def test_an_instruction_is_before_the_prompt_and_a_negative_one_in_its_place(
    tokenize_after_instruction: PromptTokenizers,
) -> None:
    tokens = tokenize_after_instruction(["W0 ", " w1 W2\n"])
    assert tokens.inputs[0]["input_ids"].tolist() == [[0, 0, 1, 4, 0, 0, 0], [1, 13, 12, 11, 5, 6, 0]]
    assert tokens.inputs[0]["attention_mask"].tolist() == [[0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]
    assert (tokens.count, tokens.cut) == (3, 0)


def test_a_prompt_is_cut_after_its_instruction_and_a_negative_one_where_the_denoisers_tokens_end(
    tokenize_after_instruction: PromptTokenizers,
) -> None:
    tokens = tokenize_after_instruction(["w0 " * 6, "w1 " * 6])
    assert tokens.inputs[0]["input_ids"].tolist() == [[0, 0, 1, 4, 4, 4, 4], [1, 13, 12, 11, 5, 5, 5]]
    assert (tokens.count, tokens.cut) == (4 + 3, 2 + 3)


def test_what_reads_most_of_a_prompt_counts_its_tokens(tmp_path: Path) -> None:
    """As in FLUX.1, where CLIP only pools the beginning of what T5 reads whole."""
    save_tokenizer(tmp_path, "tokenizer", length=3, multiple=None)
    save_tokenizer(tmp_path, "tokenizer_2", length=8, multiple=None)
    plain = replace(TEMPLATE, before="", after="", inputs=("input_ids",))
    texts = [replace(plain, segment=None), replace(plain, encoder="text_encoder_2", tokenizer="tokenizer_2")]
    tokens = PromptTokenizers(tmp_path, texts)(["w0 w1 w2 w3 w4"])
    assert [given["input_ids"].shape for given in tokens.inputs] == [(1, 3), (1, 8)]
    assert (tokens.count, tokens.cut) == (5, 0)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("bad , badv2", "bad bad_1 , badv2 badv2_1 badv2_2"),
        ("BADV2 bad", "badv2 badv2_1 badv2_2 bad bad_1"),
        ("badv2 w0", "badv2 badv2_1 badv2_2 w0"),
    ],
)
def test_a_concept_whose_name_begins_anothers_leaves_it_whole(prompt: str, read: str, tmp_path: Path) -> None:
    concepts = ["bad", "bad_1", "badv2", "badv2_1", "badv2_2"]
    tokenizer = Tokenizer(models.WordLevel({"[pad]": 0, "w0": 1, ",": 2}, unk_token="[pad]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in concepts])
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=12, pad_id=0, pad_token="[pad]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = PromptTokenizers(tmp_path, [replace(TEMPLATE, before="", after="")])([prompt])
    ids = [token for token in tokens.inputs[0]["input_ids"][0].tolist() if token]
    assert [tokenizer.id_to_token(token) for token in ids] == read.split()
