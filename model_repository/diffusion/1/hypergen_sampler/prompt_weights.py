r"""Weights of a prompt's parts, in the syntax of AUTOMATIC1111's stable-diffusion-webui, and what weights do.

`(word)` is 1.1 times as strong, `[word]` 1.1 times weaker, `(word:1.3)` 1.3 times as strong; brackets nest, and `\(` is
a bracket of the text. `BREAK` ends a chunk. There are no errors: an opening bracket without a closing one reaches to
the end, and what is no syntax is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hypergen_sampler.compel_syntax import parts_of

NONE, A1111, COMPEL = "none", "a1111", "compel"

Array = npt.NDArray[np.float32]

_STRONGER = 1.1
_WEAKER = 1 / _STRONGER
_TOKENS = re.compile(r"\\[()\[\]\\]?|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]:]|[^\\()\[\]:]+")
# Without the spaces around it: to look for them at each of thousands of spaces would take seconds.
_BREAK = re.compile(r"\bBREAK\b")


class WeightsOverflowError(ValueError):
    """The weighted hidden states are not finite."""


@dataclass(frozen=True)
class Fragment:
    """A part of a prompt with its weight; after a `BREAK` it begins a chunk."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False


def fragments_of(prompt: str, weighting: str) -> list[Fragment]:
    """The parts of a prompt; at least one.

    Raises:
        UnsupportedOperatorError: compel has an operator there that is not supported.
    """
    match weighting:
        case "a1111":
            return _Parser().parse(prompt)
        case "compel":
            return [Fragment(text, weight) for text, weight in parts_of(prompt)]
        case _:
            return [Fragment(prompt)]


class Weights(Protocol):
    """What weights do to hidden states."""

    def apply(self, states: Array) -> Array:
        """The weighted hidden states [B, L, D].

        Raises:
            WeightsOverflowError: weights are too large, or cancel each other.
        """
        ...


@dataclass(frozen=True)
class MeanRestored:
    """stable-diffusion-webui's: hidden states times the weights [B, L] of their tokens, with the mean of each row."""

    weights: Array

    def apply(self, states: Array) -> Array:
        with np.errstate(all="ignore"):
            scaled = states * self.weights[..., None]
            scaled *= states.mean(axis=(1, 2), keepdims=True) / scaled.mean(axis=(1, 2), keepdims=True)
        return _finite(np.where((self.weights == 1.0).all(axis=1)[:, None, None], states, scaled))


@dataclass(frozen=True)
class AwayFromEmpty:
    """compel's: away from the hidden states of an empty prompt, by the weights [B, L] of their tokens.

    B rows of hidden states are followed by those of an empty chunk, then by rows in which a part with a weight below 1
    is masked: (row, share) of each. A row becomes the mean of itself and of these, by their shares; where a part is in
    another chunk of the prompt, itself takes the share. `totals` [B] are the sums of shares, its own 1 included.
    """

    weights: Array
    masked: tuple[tuple[int, float], ...]
    totals: Array

    def apply(self, states: Array) -> Array:
        rows = len(self.weights)
        empty = states[rows]
        with np.errstate(all="ignore"):
            made = self._away(states[:rows], empty, self.weights)
            base, left = made.copy(), self.totals.copy()
            mixed = np.zeros_like(made)
            for (row, share), other in zip(self.masked, states[rows + 1 :], strict=True):
                mixed[row] += np.float32(share) * self._away(other, empty, self.weights[row])
                left[row] -= np.float32(share)
            made = (left[:, None, None] * base + mixed) / self.totals[:, None, None]
        is_own = (self.totals == 1.0)[:, None, None]
        return _finite(np.where(is_own, base, made))

    @staticmethod
    def _away(states: Array, empty: Array, weights: Array) -> Array:
        away: Array = np.where(weights[..., None] == 1.0, states, empty + (states - empty) * weights[..., None])
        return away


def _finite(states: Array) -> Array:
    if not np.isfinite(states).all():
        raise WeightsOverflowError
    return states


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
            self.parts += _split_at_breaks(token)

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


def _split_at_breaks(text: str) -> list[tuple[str, bool]]:
    """The texts between `BREAK`s, without the spaces beside them, and whether each is after one."""
    texts = _BREAK.split(text)
    texts[1:] = [each.lstrip() for each in texts[1:]]
    texts[:-1] = [each.rstrip() for each in texts[:-1]]
    return [(each, number > 0) for number, each in enumerate(texts)]
