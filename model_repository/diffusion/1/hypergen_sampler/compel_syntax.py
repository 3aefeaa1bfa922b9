r"""Weights of a prompt's parts in compel's syntax.

`word++` is 1.1² times as strong, `word--` 0.9² times; `(a few words)1.3` and `"a few words"-` weigh several at once,
and brackets nest. `\(` is a bracket of the text. What is no syntax is text.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, field

_UP, _DOWN = 1.1, 0.9
# Deeper brackets are text.
_MAX_DEPTH = 64
_SYNTAX = r"()\",.+\-="
_WORD = re.compile(rf"(?:\\[{_SYNTAX}]|[-+](?![\s{_SYNTAX}]|$)|[^\s{_SYNTAX}])+")
_FREE_WORD = re.compile(r"\S+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n])*)"')
_SIGNS = re.compile(r"\++|-+")
_NUMBER = re.compile(r"[+-]?(?:\d+\.\d*|\d*\.\d+)|-?\d+")
_SPACE = re.compile(r"\s*")
_OPERATOR = re.compile(r"\.(and|add|attend|blend|swap)\(")
_LORA = re.compile(r"(useLora|withLora)\(")

Part = tuple[str, float]


class UnsupportedOperatorError(ValueError):
    """An operator of compel that is not supported; `str()` is its name."""


def parts_of(prompt: str) -> list[Part]:
    """The parts of a prompt and their weights; at least one.

    Raises:
        UnsupportedOperatorError: the prompt has an operator such as `.and()`.
    """
    return _Parser(re.sub(r",(\S)", r", \1", prompt)).parse()


@dataclass
class _Parser:
    text: str
    groups: dict[int, tuple[int, list[Part]] | None] = field(default_factory=dict)
    """What was read as brackets from a position on: where they end and what is in them; None: they are text."""

    def parse(self) -> list[Part]:
        parts: list[Part] = []
        position = _after_space(self.text, 0)
        while position < len(self.text):
            found = self._element(position, 0)
            if found is None:
                match = _FREE_WORD.match(self.text, position)
                assert match is not None
                found = match.end(), [(_unescaped(match[0]), 1.0)]
            position, more = found
            parts += more
            position = _after_space(self.text, position)
        return _joined(parts)

    def _element(self, position: int, depth: int) -> tuple[int, list[Part]] | None:
        """A weighted word, or brackets or quotes with or without a weight."""
        if match := _LORA.match(self.text, position):
            raise UnsupportedOperatorError(match[1])
        group = self._quoted(position, depth) if self.text.startswith('"', position) else self._group(position, depth)
        if group is not None:
            end, parts = group
            self._reject_operator(end)
            weight = _SIGNS.match(self.text, end) or _NUMBER.match(self.text, end)
            return group if weight is None else (weight.end(), _scaled(parts, _weight(weight[0])))
        word = _WORD.match(self.text, position)
        if word is None:
            return None
        self._reject_operator(word.end())
        signs = _SIGNS.match(self.text, word.end())
        return None if signs is None else (signs.end(), [(_unescaped(word[0]), _weight(signs[0]))])

    def _group(self, position: int, depth: int) -> tuple[int, list[Part]] | None:
        if not self.text.startswith("(", position) or depth == _MAX_DEPTH:
            return None
        if position not in self.groups:
            read = self._inside(position + 1, depth + 1)
            end, parts = read
            self.groups[position] = (end + 1, parts) if self.text.startswith(")", end) else None
        return self.groups[position]

    def _inside(self, position: int, depth: int) -> tuple[int, list[Part]]:
        """Elements, words and the signs between them, up to what is none of these."""
        parts: list[Part] = []
        while True:
            position = _after_space(self.text, position)
            found = self._element(position, depth)
            if found is None:
                word = _WORD.match(self.text, position)
                if word is not None:
                    found = word.end(), [(_unescaped(word[0]), 1.0)]
                elif self.text[position : position + 1] in (",", "."):
                    found = position + 1, [(self.text[position], 1.0)]
                else:
                    return position, parts
            position, more = found
            parts += more

    def _quoted(self, position: int, depth: int) -> tuple[int, list[Part]] | None:
        match = _QUOTED.match(self.text, position)
        if match is None or depth == _MAX_DEPTH:
            return None
        if not match[1].strip():
            return match.end(), [("", 1.0)]
        inner = _Parser(match[1].replace('\\"', '"').replace('"', '\\"'))
        end, parts = inner._inside(0, depth + 1)
        return (match.end(), parts) if end == len(inner.text) else None

    def _reject_operator(self, position: int) -> None:
        if match := _OPERATOR.match(self.text, position):
            raise UnsupportedOperatorError(f".{match[1]}()")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _weight(text: str) -> float:
    if text[0] in "+-" and not text[-1].isdigit() and text[-1] != ".":
        with contextlib.suppress(OverflowError):
            return float((_UP if text[0] == "+" else _DOWN) ** len(text))
        return math.inf  # which has no finite result
    return float(text)


def _scaled(parts: list[Part], weight: float) -> list[Part]:
    return [(text, own * weight) for text, own in parts]


def _unescaped(text: str) -> str:
    return re.sub(r'\\([()"])', r"\1", text)


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one weight become one part."""
    joined: list[Part] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = f"{joined[-1][0]} {text}", weight
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]
