"""Where stable-diffusion-webui cuts prompts, as its `tokenize_line` does: full chunks, and commas within 20 tokens."""

from __future__ import annotations

import pytest

from hypergen_sampler.prompt_chunks import split

COMMA = 0


def words(count: int, first: int = 1) -> list[int]:
    return list(range(first, first + count))


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        ([], [0]),
        (words(75), [75]),
        (words(76), [75, 1]),
        (words(300), [75, 75, 75, 75]),
        ([*words(60), COMMA, *words(20)], [61, 20]),
        ([*words(54), COMMA, *words(40)], [75, 20]),
        ([*words(55), COMMA, *words(40)], [56, 40]),
        ([*words(74), COMMA, *words(3)], [75, 3]),
        ([*words(75), COMMA, *words(3)], [75, 4]),
        ([*words(60), COMMA, *words(14), COMMA], [75, 1]),
        ([*words(70), COMMA, *words(73), COMMA, *words(20)], [71, 74, 20]),
        ([*words(70), COMMA, *words(80)], [71, 75, 5]),
    ],
    ids=[
        "nothing",
        "one chunk",
        "one token more",
        "four chunks",
        "after a comma nearby",
        "a comma 21 tokens before",
        "a comma 20 tokens before",
        "a comma at the end of a chunk",
        "a comma at the beginning of a chunk",
        "a comma where the chunk is full",
        "a comma of each chunk",
        "a comma counts once",
    ],
)
def test_chunks_are_cut_where_stable_diffusion_webui_cuts_them(ids: list[int], lengths: list[int]) -> None:
    chunks = [ids[chunk] for chunk in split(ids, 75, COMMA)]
    assert [len(chunk) for chunk in chunks] == lengths
    assert [token for chunk in chunks for token in chunk] == ids


def test_a_vocabulary_without_a_comma_is_cut_at_full_chunks() -> None:
    ids = [COMMA, *words(80)]
    assert [len(ids[chunk]) for chunk in split(ids, 75, None)] == [75, 6]
