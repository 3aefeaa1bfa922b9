"""compel's syntax, against what compel 2.5.1 parses: `PromptParser().parse_conjunction(prompt).prompts[0].children`."""

from __future__ import annotations

import pytest

from hypergen_sampler.compel_syntax import UnsupportedOperatorError, parts_of
from hypergen_sampler.prompt_chunks import split_at_sentences

UP, DOWN = 1.1, 0.9

PARSED: dict[str, list[tuple[str, float]]] = {
    "": [("", 1.0)],
    "plain  words,not more": [("plain words, not more", 1.0)],
    "a cat++ on a mat-": [("a", 1.0), ("cat", UP**2), ("on a", 1.0), ("mat", DOWN)],
    "(two words)1.3 (and)-": [("two words", 1.3), ("and", DOWN)],
    '"two words"++': [("two words", UP**2)],
    "(a (b c)+ d)0.5": [("a", 0.5), ("b c", 0.55), ("d", 0.5)],
    "(no weight) here": [("no weight here", 1.0)],
    r"a \(literal\) (b\))+": [("a (literal)", 1.0), ("b)", UP)],
    "well-known c++11": [("well-known", 1.0), ("c", UP**2), ("11", 1.0)],
    "(unbalanced++ a": [("(unbalanced++ a", 1.0)],
    "a)b++ 1.5": [("a)b++ 1.5", 1.0)],
    "cat+, dog- .": [("cat", UP), (",", 1.0), ("dog", DOWN), (".", 1.0)],
    "(a, b.)2": [("a , b .", 2.0)],
    "(a) ++": [("a ++", 1.0)],
}


@pytest.mark.parametrize(("prompt", "parts"), PARSED.items(), ids=PARSED)
def test_a_prompt_is_parsed_as_by_compel(prompt: str, parts: list[tuple[str, float]]) -> None:
    parsed = parts_of(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in parts]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in parts], rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "operator"),
    [
        ('("a", "b").and()', r"\.and\(\)"),
        ('("a", "b").blend(0.7, 0.3)', r"\.blend\(\)"),
        ("a cat.swap(dog)", r"\.swap\(\)"),
        ("(a).attend(1.3)", r"\.attend\(\)"),
        ("withLora(ink)", "withLora"),
    ],
)
def test_an_operator_that_is_not_supported_is_named(prompt: str, operator: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=f"^{operator}$"):
        parts_of(prompt)


@pytest.mark.parametrize("prompt", ["(" * 10_000 + "a", "(a" * 10_000 + ")+" * 10_000, '"' * 10_001, "a+ " * 10_000])
def test_thousands_of_brackets_are_parsed(prompt: str) -> None:
    assert "".join(text for text, _ in parts_of(prompt)).count("a") == prompt.count("a")


def test_a_weight_beyond_floating_point_is_infinite_which_its_use_refuses() -> None:
    assert parts_of("cat" + "+" * 8000) == [("cat", float("inf"))]
    assert parts_of("cat" + "-" * 8000) == [("cat", 0.0)]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a b c", [3]),
        ("a b . c d , e f g", [3, 3, 3]),
        ("a b c d , e f", [5, 2]),
        ("a b c d e f", [5, 1]),
        ("a b c d x- y- z", [4, 3]),
        ("x- " * 7, [5, 2]),
    ],
    ids=["one chunk", "sentence, then phrase", "phrase", "word", "word's beginning", "nowhere"],
)
def test_long_prompts_are_cut_where_compel_cuts_them(text: str, lengths: list[int]) -> None:
    tokens = [word[:-1] if word.endswith("-") else f"{word}</w>" for word in text.split()]
    chunks = [tokens[chunk] for chunk in split_at_sentences(tokens, 5)]
    assert [len(chunk) for chunk in chunks] == lengths
    assert [token for chunk in chunks for token in chunk] == tokens
