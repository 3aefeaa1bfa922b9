"""Tokenization of prompts. The exported tokenizers pad and truncate to the positions of their text encoders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from hypergen_sampler.prompt_chunks import COMMA, split
from hypergen_sampler.request import TextInput

EncoderInputs = Mapping[str, npt.NDArray[np.int32]]

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts."""

    inputs: list[EncoderInputs]
    """The inputs [B, L] of each text encoder by name: `chunks` rows of one text, then those of the next."""
    count: int
    """Number of tokens of all texts, without start, end, padding and template."""
    cut: int
    """Number of truncated tokens of all texts."""
    chunks: int
    """Chunks of each text: those of the longest, as shorter ones are continued with empty chunks."""


class PromptTokenizers:
    """The checkpoint's tokenizers, one for each text encoder, read from `folder/NAME.json`."""

    def __init__(self, folder: Path, text_inputs: Sequence[TextInput]) -> None:
        self._tokenizers = [_tokenizer(folder, text) for text in text_inputs]
        # Tokens are counted by what reads most of a prompt: others only pool it.
        self._longest = max(tokenizer.length for tokenizer in self._tokenizers)

    def __call__(self, prompts: list[str]) -> Tokens:
        """Tokenize the texts, which all text encoders read."""
        texts = [tokenizer.encode(prompts) for tokenizer in self._tokenizers]
        counted = [
            each.own_tokens
            for tokenizer, each in zip(self._tokenizers, texts, strict=True)
            if tokenizer.length == self._longest
        ]
        chunks = max(each.chunks for each in texts)
        return Tokens(
            inputs=[each.inputs(chunks) for each in texts],
            count=sum(read for read, _ in counted[0]),
            cut=max(sum(cut for _, cut in batch) for batch in counted),
            chunks=chunks,
        )


class _Texts(Protocol):
    """Texts tokenized for one text encoder."""

    @property
    def own_tokens(self) -> list[tuple[int, int]]:
        """Of each text, how many tokens are read, and how many are cut."""
        ...

    @property
    def chunks(self) -> int:
        """How many chunks the longest text has."""
        ...

    def inputs(self, chunks: int) -> EncoderInputs:
        """The text encoder's inputs [B, L] with `chunks` rows for each text."""
        ...


class _Tokenizer(Protocol):
    """The tokenizer of one text encoder; `length` are the tokens of a prompt's first chunk."""

    length: int

    def encode(self, prompts: list[str]) -> _Texts:
        """Tokenize the texts."""
        ...


def _tokenizer(folder: Path, text: TextInput) -> _Tokenizer:
    file = folder / f"{text.tokenizer}.json"
    return _TemplateTokenizer(file, text) if text.max_chunks == 1 else _ChunkTokenizer(file, text)


class _ChunkTokenizer:
    """A CLIP tokenizer, whose text encoder reads long prompts in chunks."""

    def __init__(self, file: Path, text: TextInput) -> None:
        self._concepts = _Concepts(file)
        self._max_chunks = text.max_chunks
        self._tokenizer = Tokenizer.from_file(str(file))
        self._start, self._end, *_ = self._empty = list(self._tokenizer.encode("").ids)
        padding = self._tokenizer.padding
        assert padding is not None, "written by the exporter"
        self._pad = padding["pad_id"]
        self.length = len(self._empty)
        self._comma = self._tokenizer.token_to_id(COMMA)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, prompts: list[str]) -> _ChunkedTexts:
        own = [
            self._tokenizer.encode(self._concepts.spell_out(prompt), add_special_tokens=False).ids for prompt in prompts
        ]
        chunks = [list(split(ids, self.length - 2, self._comma)) for ids in own]
        read = [each[: self._max_chunks] for each in chunks]
        return _ChunkedTexts(
            rows=[[self._row(chunk) for chunk in each] for each in read],
            own_tokens=[
                (sum(map(len, kept)), sum(map(len, each[self._max_chunks :])))
                for kept, each in zip(read, chunks, strict=True)
            ],
            empty=self._empty,
        )

    def _row(self, chunk: Sequence[int]) -> list[int]:
        row = [self._start, *chunk, self._end]
        return row + [self._pad] * (self.length - len(row))


@dataclass(frozen=True)
class _ChunkedTexts:
    rows: list[list[list[int]]]
    """Of each text, the token ids of its chunks."""
    own_tokens: list[tuple[int, int]]
    empty: list[int]
    """The token ids of the empty text."""

    @property
    def chunks(self) -> int:
        return max(map(len, self.rows))

    def inputs(self, chunks: int) -> EncoderInputs:
        rows = [row for each in self.rows for row in each + [self.empty] * (chunks - len(each))]
        return {INPUT_IDS: np.array(rows, dtype=np.int32)}


class _TemplateTokenizer:
    """A tokenizer with the text around its prompts; longer ones are cut."""

    def __init__(self, file: Path, text: TextInput) -> None:
        self._text = text
        self._concepts = _Concepts(file)
        self._tokenizer = Tokenizer.from_file(str(file))
        truncation = self._tokenizer.truncation
        assert truncation is not None, "written by the exporter"
        self.length: int = truncation["max_length"]
        bare = Tokenizer.from_file(str(file))
        bare.no_padding()
        self._before_tokens, self._template_tokens = (
            _own_tokens(bare.encode(around)) for around in (text.before, text.before + text.after)
        )

    def encode(self, prompts: list[str]) -> _TemplateTexts:
        before, after = self._text.before, self._text.after
        encodings = self._tokenizer.encode_batch(
            [f"{before}{self._concepts.spell_out(prompt)}{after}" for prompt in prompts]
        )
        return _TemplateTexts(self._text.inputs, encodings, [self._count(each) for each in encodings])

    def _count(self, encoding: Encoding) -> tuple[int, int]:
        read = _own_tokens(encoding)
        own = read + sum(map(_own_tokens, encoding.overflowing)) - self._template_tokens
        # A truncated text ends within the prompt: its template's end is cut, too.
        own_read = min(own, read - self._before_tokens)
        return own_read, own - own_read


@dataclass(frozen=True)
class _TemplateTexts:
    names: tuple[str, ...]
    """Of the text encoder's inputs."""
    encodings: list[Encoding]
    own_tokens: list[tuple[int, int]]

    @property
    def chunks(self) -> int:
        return 1

    def inputs(self, chunks: int) -> EncoderInputs:
        assert chunks == 1, "no family has both kinds of text encoders"
        columns = {
            INPUT_IDS: [each.ids for each in self.encodings],
            ATTENTION_MASK: [each.attention_mask for each in self.encodings],
        }
        return {name: np.array(columns[name], dtype=np.int32) for name in self.names}


class _Concepts:
    """Concepts of textual inversion with several vectors: the tokens T, T_1, T_2, … of one tokenizer.

    A prompt contains only T, which diffusers' pipelines replace by "T T_1 T_2 …" (`maybe_convert_prompt`).
    """

    def __init__(self, file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
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
