"""Prompts to token ids. The exported tokenizers already pad and truncate to their text encoders' positions.

Knows the tokenizers' files alone; the text encoders are reached through `bls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


class PromptTokenizers:
    """The checkpoint's tokenizers, one for each text encoder, read from `folder/NAME.json`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._tokenizers: list[Tokenizer] = [Tokenizer.from_file(str(folder / f"{name}.json")) for name in names]

    def __call__(self, prompts: list[str]) -> list[npt.NDArray[np.int32]]:
        """For each text encoder token ids [B, L]; what is longer than it reads is cut off, as diffusers does."""
        return [_ids(tokenizer, prompts) for tokenizer in self._tokenizers]


def _ids(tokenizer: Tokenizer, prompts: list[str]) -> npt.NDArray[np.int32]:
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(prompts)], dtype=np.int32)
