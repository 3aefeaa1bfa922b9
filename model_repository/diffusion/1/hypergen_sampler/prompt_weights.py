r"""Weights of a prompt's parts, in the syntax of AUTOMATIC1111's stable-diffusion-webui.

`(word)` is 1.1 times as strong, `[word]` 1.1 times weaker, `(word:1.3)` 1.3 times as strong; brackets nest, and `\(` is
a bracket of the text. `BREAK` ends a chunk. There are no errors: an opening bracket without a closing one reaches to
the end, and what is no syntax is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

NONE, A1111 = "none", "a1111"

Array = npt.NDArray[np.float32]

_STRONGER = 1.1
_WEAKER = 1 / _STRONGER
_TOKENS = re.compile(r"\\[()\[\]\\]?|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class WeightsOverflowError(ValueError):
    """The weighted hidden states are not finite."""


@dataclass(frozen=True)
class Fragment:
    """A part of a prompt with its weight; after a `BREAK` it begins a chunk."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False


def fragments_of(prompt: str, weighting: str) -> list[Fragment]:
    """The parts of a prompt; at least one."""
    return _Parser().parse(prompt) if weighting == A1111 else [Fragment(prompt)]


def weighted(states: Array, weights: Array) -> Array:
    """Hidden states [B, L, D] times the weights [B, L] of their tokens, each row with the mean that it had.

    Raises:
        WeightsOverflowError: weights are too large, or cancel each other.
    """
    with np.errstate(all="ignore"):
        scaled = states * weights[..., None]
        scaled *= states.mean(axis=(1, 2), keepdims=True) / scaled.mean(axis=(1, 2), keepdims=True)
    made = np.where((weights == 1.0).all(axis=1)[:, None, None], states, scaled)
    if not np.isfinite(made).all():
        raise WeightsOverflowError
    return made


@dataclass
class _Parser:
    """Parts, and the ranges of parts whose weights are multiplied, in the order of their ends."""

    parts: list[tuple[str, bool]] = field(default_factory=list)
    ranges: list[tuple[int, int, float]] = field(default_factory=list)
    round_starts: list[int] = field(default_factory=list)
    square_starts: list[int] = field(default_factory=list)

    def parse(self, prompt: str) -> list[Fragment]:
        for match in _TOKENS.finditer(prompt):
            self._read(match[0], match["weight"])
        for starts, factor in ((self.round_starts, _STRONGER), (self.square_starts, _WEAKER)):
            while starts:
                self._close(starts, factor)
        return list(self._merged()) or [Fragment("")]

    def _read(self, token: str, weight: str | None) -> None:
        if token == "(":
            self.round_starts.append(len(self.parts))
        elif token == "[":
            self.square_starts.append(len(self.parts))
        elif weight is not None and self.round_starts:
            self._close(self.round_starts, float(weight))
        elif token == ")" and self.round_starts:
            self._close(self.round_starts, _STRONGER)
        elif token == "]" and self.square_starts:
            self._close(self.square_starts, _WEAKER)
        elif token[0] == "\\":
            self.parts.append((token[1:], False))
        else:
            first, *others = _BREAK.split(token)
            self.parts += [(first, False), *((text, True) for text in others)]

    def _close(self, starts: list[int], factor: float) -> None:
        self.ranges.append((starts.pop(), len(self.parts), factor))

    def _merged(self) -> Iterator[Fragment]:
        """The parts, neighbours of one weight joined."""
        texts: list[str] = []
        begins_chunk = False
        weights = self._weights()
        for index, (text, breaks) in enumerate(self.parts):
            if texts and (breaks or weights[index] != weights[index - 1]):
                yield Fragment("".join(texts), weights[index - 1], begins_chunk)
                texts, begins_chunk = [], breaks
            texts.append(text)
        if texts:
            yield Fragment("".join(texts), weights[-1], begins_chunk)

    def _weights(self) -> list[float]:
        # An array, as thousands of brackets around thousands of parts are legal.
        weights = np.ones(len(self.parts))
        with np.errstate(over="ignore"):
            for first, end, factor in self.ranges:
                weights[first:end] *= factor
        made: list[float] = weights.tolist()
        return made
