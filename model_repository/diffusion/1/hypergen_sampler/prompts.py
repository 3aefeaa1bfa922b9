"""Tokenization of prompts. The exported tokenizers pad and truncate to the positions of their text encoders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts, the input of the text encoders."""

    ids: list[npt.NDArray[np.int32]]
    """[B, L] for each text encoder, truncated to its length as in diffusers."""
    count: int
    """Number of tokens of all texts, without start, end and padding."""
    cut: int
    """Number of truncated tokens of all texts, for the text encoder that truncates most."""


class PromptTokenizers:
    """The checkpoint's tokenizers, one for each text encoder, read from `folder/NAME.json`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        files = [str(folder / f"{name}.json") for name in names]
        self._tokenizers: list[Tokenizer] = [Tokenizer.from_file(file) for file in files]
        self._concepts = [_Concepts(file) for file in files]

    def __call__(self, prompts: list[str]) -> Tokens:
        """Tokenize the texts. All text encoders read the same texts, so only the first one's tokens are counted."""
        encodings = [
            tokenizer.encode_batch([concepts.spell_out(prompt) for prompt in prompts])
            for tokenizer, concepts in zip(self._tokenizers, self._concepts, strict=True)
        ]
        return Tokens(
            ids=[_ids(batch) for batch in encodings],
            count=sum(_own_tokens(each) for each in encodings[0]),
            cut=max(sum(_own_tokens(part) for each in batch for part in each.overflowing) for batch in encodings),
        )


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


def _ids(batch: list[Encoding]) -> npt.NDArray[np.int32]:
    return np.array([encoding.ids for encoding in batch], dtype=np.int32)


def _own_tokens(encoding: Encoding) -> int:
    return encoding.special_tokens_mask.count(0)
