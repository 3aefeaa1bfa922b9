"""Prompts to token ids. The exported tokenizers already pad and truncate to their text encoders' positions.

Knows the tokenizers' files alone; the text encoders are reached through `bls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Texts as the text encoders read them."""

    ids: list[npt.NDArray[np.int32]]
    """[B, L] for each text encoder; what is longer than it reads is cut off, as diffusers does."""
    count: int
    """Of all texts together, without the start, end and padding that every text gets."""


class PromptTokenizers:
    """The checkpoint's tokenizers, one for each text encoder, read from `folder/NAME.json`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._tokenizers: list[Tokenizer] = [Tokenizer.from_file(str(folder / f"{name}.json")) for name in names]

    def __call__(self, prompts: list[str]) -> Tokens:
        """The texts' tokens. All text encoders read the same texts, so the first one's are counted."""
        encodings = [tokenizer.encode_batch(prompts) for tokenizer in self._tokenizers]
        return Tokens([_ids(batch) for batch in encodings], sum(_own_tokens(each) for each in encodings[0]))


def _ids(batch: list[Encoding]) -> npt.NDArray[np.int32]:
    return np.array([encoding.ids for encoding in batch], dtype=np.int32)


def _own_tokens(encoding: Encoding) -> int:
    return encoding.special_tokens_mask.count(0)
