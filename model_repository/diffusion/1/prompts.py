"""Prompts to token ids. The exported `tokenizer.json` already pads and truncates to the text encoder's positions.

Knows the tokenizer's file alone; the text encoder is reached through `bls`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


class PromptTokenizer:
    """The checkpoint's tokenizer, read from `folder/tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __call__(self, prompts: list[str]) -> npt.NDArray[np.int32]:
        """Token ids [B, L]; what is longer than the text encoder reads is cut off, as diffusers does."""
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch(prompts)], dtype=np.int32)
