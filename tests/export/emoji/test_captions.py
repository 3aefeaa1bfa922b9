"""The grammar of captions."""

from __future__ import annotations

import re
from random import Random

import pytest

from captions import (
    FILLERS,
    LEADS,
    ONLY_COLOUR,
    TAILS,
    UNSEEN,
    WITH_COLOUR,
    WITHOUT_COLOUR,
    article,
    caption,
    fill,
    unseen_caption,
)
from world import COLOUR_NAMES, emoji_list

NAMES = ("red apple", "apple")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"\{.*?\}", "", text))


@pytest.mark.parametrize("colour", COLOUR_NAMES)
def test_a_caption_says_name_and_colour(colour: str) -> None:
    random = Random(0)
    for _ in range(200):
        text = caption(random, NAMES, colour)
        assert "apple" in text
        assert colour in text or (colour == "purple" and "violet" in text)


def test_a_caption_without_colour_names_none() -> None:
    random = Random(0)
    texts = [caption(random, ("rocket",), "") for _ in range(300)]
    assert not any(colour in text.split() for text in texts for colour in COLOUR_NAMES)


def test_a_caption_of_the_colour_alone_names_no_emoji() -> None:
    assert caption(Random(0), (), "blue") in {fill(template, "", "blue") for template in ONLY_COLOUR}


def test_the_same_seed_gives_the_same_caption() -> None:
    assert caption(Random(3), NAMES, "red") == caption(Random(3), NAMES, "red")


def test_the_wordings_of_the_evaluation_are_not_in_training() -> None:
    """Each holds words that no caption of training has, as words or among the meaningless ones."""
    seen = {*WITH_COLOUR, *WITHOUT_COLOUR, *ONLY_COLOUR, *LEADS, *TAILS, *FILLERS}
    seen_words = {word for text in seen for word in words_of(text)}
    for template in UNSEEN:
        assert set(words_of(template)) - seen_words, template


def test_an_unseen_caption_says_name_and_colour() -> None:
    random = Random(0)
    for _ in range(50):
        text = unseen_caption(random, "owl", "green")
        assert "an owl" in text or "owl" in text
        assert "green" in text


@pytest.mark.parametrize(("words", "before"), [("owl", "an"), ("orange", "an"), ("cat", "a"), ("grapes", "some")])
def test_the_article_fits(words: str, before: str) -> None:
    assert article(words) == before


def test_no_meaningless_word_is_a_name_or_a_colour() -> None:
    names = {name for one in emoji_list() for name in one.names}
    assert not set(FILLERS) & (names | set(COLOUR_NAMES))
