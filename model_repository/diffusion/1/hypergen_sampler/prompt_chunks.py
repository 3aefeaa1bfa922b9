"""How a prompt that is longer than a text encoder's positions is cut into chunks, which are encoded one by one.

Follows AUTOMATIC1111's stable-diffusion-webui: chunks are full, but one that is cut within 20 tokens after a comma ends
with that comma, so that phrases stay whole. Each chunk is read as a prompt of its own, with start, end and padding, and
the hidden states are joined along the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

COMMA = ",</w>"
"""CLIP's token of a comma at the end of a word."""
_BACKTRACK = 20


def split(ids: Sequence[int], room: int, comma: int | None) -> Iterator[slice]:
    """The chunks of at most `room` token ids; at least one, which may be empty. `comma` is the id of `COMMA`."""
    first, last_comma = 0, None
    for position, token in enumerate(ids):
        if position - first < room:
            last_comma = position if token == comma else last_comma
            continue
        is_near = last_comma is not None and position - last_comma <= _BACKTRACK
        end = last_comma + 1 if is_near and last_comma is not None and token != comma else position
        yield slice(first, end)
        first, last_comma = end, None
    yield slice(first, len(ids))


def split_at_sentences(tokens: Sequence[str], room: int) -> Iterator[slice]:
    """The chunks of at most `room` tokens as compel cuts them: after a sentence, else a phrase, else a word."""
    first = 0
    while len(tokens) - first > room:
        length = next(filter(None, (_last(tokens[first : first + room], ends) for ends in _ENDS)), room)
        yield slice(first, first + length)
        first += length
    yield slice(first, len(tokens))


_ENDS = (re.compile(r"\.</w>"), re.compile(r"[.,;:]</w>"), re.compile(r".*</w>", re.DOTALL))


def _last(tokens: Sequence[str], ends: re.Pattern[str]) -> int:
    """How many tokens there are up to the last one that matches; 0 if none does."""
    return next((position for position in range(len(tokens), 0, -1) if ends.fullmatch(tokens[position - 1])), 0)
