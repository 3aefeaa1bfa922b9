"""Tokenization of prompts. The exported tokenizers pad and truncate to the positions of their text encoders."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from hypergen_sampler.compel_syntax import UnsupportedOperatorError
from hypergen_sampler.prompt_chunks import COMMA, split, split_at_sentences
from hypergen_sampler.prompt_weights import COMPEL, NONE, AwayFromEmpty, Fragment, MeanRestored, Weights, fragments_of
from hypergen_sampler.request import InvalidInputError, TextInput

EncoderInputs = Mapping[str, npt.NDArray[Any]]

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
CLIP_SKIP = "clip_skip"

_NO_PART = -1
# Each takes further rows of the text encoder.
_MAX_MASKED = 64
# compel's: a weight of 0 would have an infinite share.
_LEAST = 1e-5


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts."""

    inputs: list[EncoderInputs]
    """The inputs [B, …] of each text encoder by name: `chunks` rows of one text, then those of the next."""
    weights: list[Weights | None]
    """What to do to the hidden states of each text encoder; for some weights there are further rows after those."""
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

    def __call__(self, prompts: list[str], weighting: str = NONE, clip_skip: int = 0) -> Tokens:
        """Tokenize the texts, which all text encoders read.

        `weighting` is the syntax of weights in them; `clip_skip` is for the text encoders that have such an input.
        """
        texts = [tokenizer.encode(prompts, weighting) for tokenizer in self._tokenizers]
        counted = [
            each.own_tokens
            for tokenizer, each in zip(self._tokenizers, texts, strict=True)
            if tokenizer.length == self._longest
        ]
        chunks = max(each.chunks for each in texts)
        return Tokens(
            inputs=[each.inputs(chunks, clip_skip) for each in texts],
            weights=[each.weights(chunks) for each in texts],
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

    def inputs(self, chunks: int, clip_skip: int) -> EncoderInputs:
        """The text encoder's inputs with `chunks` rows for each text."""
        ...

    def weights(self, chunks: int) -> Weights | None:
        """What to do to their hidden states."""
        ...


class _Tokenizer(Protocol):
    """The tokenizer of one text encoder; `length` are the tokens of a prompt's first chunk."""

    length: int

    def encode(self, prompts: list[str], weighting: str) -> _Texts:
        """Tokenize the texts."""
        ...


def _tokenizer(folder: Path, text: TextInput) -> _Tokenizer:
    file = folder / f"{text.tokenizer}.json"
    if text.is_instruction:
        return _InstructedTokenizer(file, text)
    return _TemplateTokenizer(file, text) if text.max_chunks == 1 else _ChunkTokenizer(file, text)


class _ChunkTokenizer:
    """A CLIP tokenizer, whose text encoder reads long prompts in chunks."""

    def __init__(self, file: Path, text: TextInput) -> None:
        self._concepts = _Concepts(file)
        self._text = text
        self._tokenizer = Tokenizer.from_file(str(file))
        self._start, self._end, *_ = self._empty = list(self._tokenizer.encode("").ids)
        padding = self._tokenizer.padding
        assert padding is not None, "written by the exporter"
        self._pad = padding["pad_id"]
        self.length = len(self._empty)
        self._comma = self._tokenizer.token_to_id(COMMA)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, prompts: list[str], weighting: str) -> _ChunkedTexts:
        chunks = [self._chunks(prompt, weighting) for prompt in prompts]
        most = self._text.max_chunks
        return _ChunkedTexts(
            names=self._text.token_inputs,
            texts=[[self._row(chunk) for chunk in each[:most]] for each in chunks],
            own_tokens=[(_length(each[:most]), _length(each[most:])) for each in chunks],
            empty=_Chunk(self._empty, [1.0] * self.length, [_NO_PART] * self.length),
            weighting=weighting,
        )

    def _chunks(self, prompt: str, weighting: str) -> list[_Chunk]:
        fragments = _fragments(prompt, weighting)
        encodings = self._tokenizer.encode_batch(
            [self._concepts.spell_out(fragment.text) for fragment in fragments], add_special_tokens=False
        )
        sections = [_Chunk([], [], [])]
        for part, (fragment, encoding) in enumerate(zip(fragments, encodings, strict=True)):
            if fragment.begins_chunk:
                sections.append(_Chunk([], [], []))
            sections[-1].ids.extend(encoding.ids)
            sections[-1].weights.extend([fragment.weight] * len(encoding.ids))
            sections[-1].parts.extend([part] * len(encoding.ids))
        if len(sections) > 1 and not sections[-1].ids:
            sections.pop()
        return [section.cut(each) for section in sections for each in self._cuts(section.ids, weighting)]

    def _cuts(self, ids: list[int], weighting: str) -> Iterator[slice]:
        room = self.length - 2
        if weighting != COMPEL:
            return split(ids, room, self._comma)
        return split_at_sentences([self._tokenizer.id_to_token(token) or "" for token in ids], room)

    def _row(self, chunk: _Chunk) -> _Chunk:
        """The chunk with start, end and padding."""
        padding = self.length - 2 - len(chunk.ids)
        return _Chunk(
            [self._start, *chunk.ids, self._end, *[self._pad] * padding],
            [1.0, *chunk.weights, 1.0, *[1.0] * padding],
            [_NO_PART, *chunk.parts, _NO_PART, *[_NO_PART] * padding],
        )


def _fragments(prompt: str, weighting: str) -> list[Fragment]:
    try:
        fragments = fragments_of(prompt, weighting)
    except UnsupportedOperatorError as operator:
        raise InvalidInputError(
            "prompt", f"has, or its negative prompt has, {operator}, which is not supported"
        ) from None
    if weighting == COMPEL and sum(fragment.weight < 1 for fragment in fragments) > _MAX_MASKED:
        raise InvalidInputError("prompt", f"must have at most {_MAX_MASKED} parts with weights below 1")
    return fragments


@dataclass(frozen=True)
class _Chunk:
    """Token ids, their weights, and the numbers of the prompt's parts that they belong to."""

    ids: list[int]
    weights: list[float]
    parts: list[int]

    def cut(self, where: slice) -> _Chunk:
        return _Chunk(self.ids[where], self.weights[where], self.parts[where])


def _length(chunks: Sequence[_Chunk]) -> int:
    return sum(len(chunk.ids) for chunk in chunks)


@dataclass(frozen=True)
class _Masked:
    """A row in which a part of the prompt is masked, and its share of the row without."""

    row: int
    mask: list[int]
    share: float


@dataclass(frozen=True)
class _ChunkedTexts:
    names: tuple[str, ...]
    """Of the text encoder's inputs."""
    texts: list[list[_Chunk]]
    own_tokens: list[tuple[int, int]]
    empty: _Chunk
    """The chunk of an empty text."""
    weighting: str

    @property
    def chunks(self) -> int:
        return max(map(len, self.texts))

    def inputs(self, chunks: int, clip_skip: int) -> EncoderInputs:
        rows = [row.ids for row in self._rows(chunks)]
        masks = [[1] * len(row) for row in rows]
        if self._are_weighted and self.weighting == COMPEL:
            masked = self._masked(chunks)
            masks += [masks[0], *(each.mask for each in masked)]
            rows += [self.empty.ids, *(rows[each.row] for each in masked)]
        columns = {INPUT_IDS: rows, ATTENTION_MASK: masks, CLIP_SKIP: [[clip_skip]] * len(rows)}
        return {name: np.array(columns[name], dtype=np.int32) for name in self.names}

    def weights(self, chunks: int) -> Weights | None:
        if not self._are_weighted:
            return None
        weights = np.array([row.weights for row in self._rows(chunks)], dtype=np.float32)
        if self.weighting != COMPEL:
            return MeanRestored(weights)
        masked = tuple((each.row, each.share) for each in self._masked(chunks))
        totals = np.repeat([1.0 + sum(share for _, share in self._weakened(text)) for text in self.texts], chunks)
        return AwayFromEmpty(weights, masked, totals.astype(np.float32))

    @property
    def _are_weighted(self) -> bool:
        return any(weight != 1.0 for text in self.texts for chunk in text for weight in chunk.weights)

    def _rows(self, chunks: int) -> list[_Chunk]:
        return [row for each in self.texts for row in each + [self.empty] * (chunks - len(each))]

    def _masked(self, chunks: int) -> list[_Masked]:
        return [
            _Masked(number * chunks + index, mask, share)
            for number, text in enumerate(self.texts)
            for part, share in self._weakened(text)
            for index, mask in _masks_without(text, part)
        ]

    @staticmethod
    def _weakened(text: list[_Chunk]) -> list[tuple[int, float]]:
        """The parts with weights below 1, and what share the prompt without each has, as in compel."""
        tokens = (zip(chunk.parts, chunk.weights, strict=True) for chunk in text)
        weights = dict(pair for chunk in tokens for pair in chunk if pair[0] != _NO_PART)
        return [
            (part, math.tan((1.0 - max(weight, _LEAST)) * math.pi / 2))
            for part, weight in weights.items()
            if weight < 1
        ]


def _masks_without(text: list[_Chunk], part: int) -> Iterator[tuple[int, list[int]]]:
    """The chunks that a part is in, each with a mask of everything from its first token to its last.

    Each chunk's start and last position are never masked, but the end of a chunk that the part goes on after is.
    """
    places = [
        (index, column) for index, chunk in enumerate(text) for column, one in enumerate(chunk.parts) if one == part
    ]
    for index in range(places[0][0], places[-1][0] + 1):
        columns = range(1, len(text[index].ids) - 1)
        inside = [places[0] <= (index, column) <= places[-1] for column in columns]
        yield index, [1, *(0 if masked else 1 for masked in inside), 1]


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

    def encode(self, prompts: list[str], _: str) -> _WholeTexts:
        before, after = self._text.before, self._text.after
        encodings = self._tokenizer.encode_batch(
            [f"{before}{self._concepts.spell_out(prompt)}{after}" for prompt in prompts]
        )
        return _WholeTexts(
            names=self._text.token_inputs,
            ids=[each.ids for each in encodings],
            masks=[each.attention_mask for each in encodings],
            own_tokens=[self._count(each) for each in encodings],
        )

    def _count(self, encoding: Encoding) -> tuple[int, int]:
        read = _own_tokens(encoding)
        own = read + sum(map(_own_tokens, encoding.overflowing)) - self._template_tokens
        # A truncated text ends within the prompt: its template's end is cut, too.
        own_read = min(own, read - self._before_tokens)
        return own_read, own - own_read


class _InstructedTokenizer:
    """A tokenizer with an instruction before its prompts, but not before negative ones, as in diffusers' SanaPipeline.

    A negative prompt is padded on the left, so that its start token is in the place of the instruction's last token:
    of all texts, the denoiser is given the start and what follows that place. Longer prompts are cut.
    """

    def __init__(self, file: Path, text: TextInput) -> None:
        self._text = text
        self._tokenizer = Tokenizer.from_file(str(file))
        truncation, padding = self._tokenizer.truncation, self._tokenizer.padding
        assert truncation is not None, "written by the exporter"
        assert padding is not None, "written by the exporter"
        self.length: int = truncation["max_length"]
        self._pad: int = padding["pad_id"]
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._place = len(self._tokenizer.encode(text.before).ids) - 2

    def encode(self, prompts: list[str], _: str) -> _WholeTexts:
        *negative, prompt = (each.lower().strip() for each in prompts)
        rows = [*(self._row("", each) for each in negative), self._row(self._text.before, prompt)]
        return _WholeTexts(
            names=self._text.token_inputs,
            ids=[ids for ids, _, _ in rows],
            masks=[mask for _, mask, _ in rows],
            own_tokens=[own for _, _, own in rows],
        )

    def _row(self, before: str, prompt: str) -> tuple[list[int], list[int], tuple[int, int]]:
        """Ids, their mask, and how many tokens of the prompt are read and cut."""
        encoding = self._tokenizer.encode(before + prompt)
        left = 0 if before else self._place
        ids = encoding.ids[: self.length - left]
        right = self.length - left - len(ids)
        # A token may join the instruction's last space and the prompt's first word.
        own = [end > len(before) for _, end in encoding.offsets]
        read = sum(own[: len(ids)])
        mask = [0] * left + [1] * len(ids) + [0] * right
        return [self._pad] * left + ids + [self._pad] * right, mask, (read, sum(own) - read)


@dataclass(frozen=True)
class _WholeTexts:
    """Texts that are not read in chunks."""

    names: tuple[str, ...]
    """Of the text encoder's inputs."""
    ids: list[list[int]]
    masks: list[list[int]]
    own_tokens: list[tuple[int, int]]

    @property
    def chunks(self) -> int:
        return 1

    def inputs(self, chunks: int, _: int) -> EncoderInputs:
        assert chunks == 1, "no family has both kinds of text encoders"
        columns = {INPUT_IDS: self.ids, ATTENTION_MASK: self.masks}
        return {name: np.array(columns[name], dtype=np.int32) for name in self.names}

    def weights(self, _: int) -> Weights | None:
        return None


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
        # The longest first and in any case, as CLIP's tokenizers read them: one may be the beginning of another.
        longest_first = sorted(added, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)

    def spell_out(self, prompt: str) -> str:
        """The prompt with each concept replaced by all of its tokens."""
        if not self._in_full:
            return prompt
        named = self._in_full.keys() & set(self._tokenizer.encode(prompt, add_special_tokens=False).tokens)
        full = {token.casefold(): self._in_full[token] for token in named}
        return self._any.sub(lambda match: full.get(match[0].casefold(), match[0]), prompt) if full else prompt


def _in_full(token: str, added: set[str]) -> str:
    others = itertools.takewhile(added.__contains__, (f"{token}_{number}" for number in itertools.count(1)))
    return " ".join((token, *others))


def _own_tokens(encoding: Encoding) -> int:
    return encoding.special_tokens_mask.count(0)
