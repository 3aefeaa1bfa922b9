"""Tokenization of prompts. The exported tokenizers pad and truncate to the positions of their text encoders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from hypergen_sampler.request import TextInput

EncoderInputs = Mapping[str, npt.NDArray[np.int32]]

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts."""

    inputs: list[EncoderInputs]
    """The inputs [B, L] of each text encoder by name, truncated to its length as in diffusers."""
    count: int
    """Number of tokens of all texts, without start, end, padding and template."""
    cut: int
    """Number of truncated tokens of all texts."""


class PromptTokenizers:
    """The checkpoint's tokenizers, one for each text encoder, read from `folder/NAME.json`."""

    def __init__(self, folder: Path, text_inputs: Sequence[TextInput]) -> None:
        self._tokenizers = [_PromptTokenizer(folder, text) for text in text_inputs]
        # Tokens are counted by what reads most of a prompt: others only pool it.
        self._longest = max(tokenizer.length for tokenizer in self._tokenizers)

    def __call__(self, prompts: list[str]) -> Tokens:
        """Tokenize the texts, which all text encoders read."""
        encodings = [tokenizer.encode(prompts) for tokenizer in self._tokenizers]
        counted = [
            [tokenizer.own_tokens(each) for each in batch]
            for tokenizer, batch in zip(self._tokenizers, encodings, strict=True)
            if tokenizer.length == self._longest
        ]
        return Tokens(
            inputs=[tokenizer.inputs(batch) for tokenizer, batch in zip(self._tokenizers, encodings, strict=True)],
            count=sum(read for read, _ in counted[0]),
            cut=max(sum(cut for _, cut in batch) for batch in counted),
        )


class _PromptTokenizer:
    """The tokenizer of one text encoder, with the text around its prompts."""

    def __init__(self, folder: Path, text: TextInput) -> None:
        file = str(folder / f"{text.tokenizer}.json")
        self._text = text
        self._tokenizer = Tokenizer.from_file(file)
        self._concepts = _Concepts(file)
        truncation = self._tokenizer.truncation
        assert truncation is not None, "written by the exporter"
        self.length: int = truncation["max_length"]
        bare = Tokenizer.from_file(file)
        bare.no_padding()
        self._before_tokens, self._template_tokens = (
            _own_tokens(bare.encode(around)) for around in (text.before, text.before + text.after)
        )

    def encode(self, prompts: list[str]) -> list[Encoding]:
        before, after = self._text.before, self._text.after
        encodings: list[Encoding] = self._tokenizer.encode_batch(
            [f"{before}{self._concepts.spell_out(prompt)}{after}" for prompt in prompts]
        )
        return encodings

    def inputs(self, batch: list[Encoding]) -> EncoderInputs:
        """The text encoder's inputs [B, L]."""
        columns = {INPUT_IDS: [each.ids for each in batch], ATTENTION_MASK: [each.attention_mask for each in batch]}
        return {name: np.array(columns[name], dtype=np.int32) for name in self._text.inputs}

    def own_tokens(self, encoding: Encoding) -> tuple[int, int]:
        """How many tokens of the prompt itself are read, and how many are cut."""
        read = _own_tokens(encoding)
        own = read + sum(map(_own_tokens, encoding.overflowing)) - self._template_tokens
        # A truncated text ends within the prompt: its template's end is cut, too.
        own_read = min(own, read - self._before_tokens)
        return own_read, own - own_read


class _Concepts:
    """Concepts of textual inversion with several vectors: the tokens T, T_1, T_2, … of one tokenizer.

    A prompt contains only T, which diffusers' pipelines replace by "T T_1 T_2 …" (`maybe_convert_prompt`).
    """

    def __init__(self, file: str) -> None:
        self._tokenizer = Tokenizer.from_file(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._in_full = {token: _in_full(token, added) for token in added if f"{token}_1" in added}

    def spell_out(self, prompt: str) -> str:
        """The prompt with each concept replaced by all of its tokens."""
        if not self._in_full:
            return prompt
        named = self._in_full.keys() & set(self._tokenizer.encode(prompt, add_special_tokens=False).tokens)
        for token in sorted(named):
            prompt = prompt.replace(token, self._in_full[token])
        return prompt


def _in_full(token: str, added: set[str]) -> str:
    others = itertools.takewhile(added.__contains__, (f"{token}_{number}" for number in itertools.count(1)))
    return " ".join((token, *others))


def _own_tokens(encoding: Encoding) -> int:
    return encoding.special_tokens_mask.count(0)
