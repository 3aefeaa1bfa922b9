"""Prompts for the models that ship with the project, and how many of their images are right."""

from __future__ import annotations

import pytest

import evaluate
from captions import plain_caption
from evaluate import Request, Score, Task, score
from support.running_server import Server
from world import COLOUR_NAMES, FONT, emoji_list

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")


def sixteen_tasks() -> list[Task]:
    """Emoji from all over the list, on two colours: every colour costs the judge a second or two."""
    colours = [COLOUR_NAMES.index("yellow"), COLOUR_NAMES.index("blue")]
    chosen = range(3, len(emoji_list()), len(emoji_list()) // 16)
    pairs = [(emoji, colours[index % 2]) for index, emoji in enumerate(chosen)][:16]
    return [
        Task(Request(plain_caption(emoji_list()[emoji].name, COLOUR_NAMES[colour]), seed), emoji, colour)
        for seed, (emoji, colour) in enumerate(pairs)
    ]


def scored(server: Server, tasks: list[Task]) -> Score:
    return score(evaluate.Server(f"http://127.0.0.1:{server.port}/v1", None), tasks)
