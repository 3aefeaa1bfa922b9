"""The syntax of weights, against what stable-diffusion-webui documents and does.

Expected values are the examples of its `modules/prompt_parser.py` (`parse_prompt_attention`), of its wiki (Features,
"Attention/emphasis" and "Infinite prompt length"), and what that function was seen to return for malformed prompts.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from hypergen_sampler.prompt_weights import Fragment, MeanRestored, WeightsOverflowError, fragments_of

UP, DOWN = 1.1, 1 / 1.1

EXAMPLES: dict[str, list[tuple[str, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", UP), (" word", 1.0)],
    "(unbalanced": [("unbalanced", UP)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", UP)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", UP),
        ("on", 1.0),
        (" a ", UP),
        ("hill", 0.55),
        (", sun, ", UP),
        ("sky", 1.4641000000000006),
        (".", UP),
    ],
    "": [("", 1.0)],
    "(word:1.5)": [("word", 1.5)],
    "(word: .5 )": [("word", 0.5)],
    "(word:-1)": [("word", -1.0)],
    "[[word]]": [("word", DOWN * DOWN)],
    "(a:b:c)": [("a:b:c", UP)],
    "(a:1.5:1.2)": [("a:1.5", 1.2)],
    "a)b]c": [("a)b]c", 1.0)],
    "a:1.3)": [("a:1.3)", 1.0)],
    "[a:1.3)": [("a:1.3)", DOWN)],
    "([a)b]": [("a", UP * DOWN), ("b", DOWN)],
    r"a\\b \x": [(r"a\b x", 1.0)],
    "(a:1.2.3)": [("a:1.2.3", UP)],
    "((": [("", 1.0)],
    "日本(語:1.2)": [("日本", 1.0), ("語", 1.2)],
}


@pytest.mark.parametrize(("prompt", "fragments"), EXAMPLES.items(), ids=EXAMPLES)
def test_a_prompt_is_parsed_as_by_stable_diffusion_webui(prompt: str, fragments: list[tuple[str, float]]) -> None:
    parsed = [(fragment.text, fragment.weight) for fragment in fragments_of(prompt, "a1111")]
    assert [text for text, _ in parsed] == [text for text, _ in fragments]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in fragments], rel=1e-15)


def test_a_break_begins_a_chunk() -> None:
    assert fragments_of("a BREAK (b BREAK c:1.2) BREAKS", "a1111") == [
        Fragment("a"),
        Fragment("", begins_chunk=True),
        Fragment("b", 1.2),
        Fragment("c", 1.2, begins_chunk=True),
        Fragment(" BREAKS"),
    ]


def test_without_a_syntax_a_prompt_is_text() -> None:
    assert fragments_of("(a:1.2) BREAK [b]", "none") == [Fragment("(a:1.2) BREAK [b]")]


@pytest.mark.parametrize("prompt", ["(" * 10_000 + "a", "(a" * 10_000 + ")" * 10_000, "[a(" * 10_000, "\\" * 30_000])
def test_thousands_of_brackets_are_parsed(prompt: str) -> None:
    texts = [fragment.text for fragment in fragments_of(prompt, "a1111")]
    assert "".join(texts).count("a") == prompt.count("a")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (" " * 30_000 + "x", None),
        ("(a:" + "1" * 30_000, None),
        ("a" + " " * 20_000 + "BREAK" + "\n" * 9_999 + "b", "ab"),
    ],
    ids=["spaces", "digits", "spaces around BREAK"],
)
def test_a_long_run_of_one_character_is_parsed_at_once(prompt: str, text: str | None) -> None:
    """A search that starts again at each character takes half a minute, and holds up every other request."""
    began = time.process_time()
    made = "".join(fragment.text for fragment in fragments_of(prompt, "a1111"))
    assert time.process_time() - began < 5, "it takes milliseconds"
    assert made == (prompt.removeprefix("(") if text is None else text)


def test_a_row_keeps_its_mean_and_unweighted_rows_their_values() -> None:
    states = np.random.default_rng(0).normal(0.5, 1.0, (2, 4, 8)).astype(np.float32)
    weights = np.array([[1.0, 1.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=np.float32)
    made = MeanRestored(weights).apply(states)
    assert np.array_equal(made[1], states[1])
    assert made[0].mean() == pytest.approx(states[0].mean(), rel=1e-5)
    scaled = states[0] * weights[0][:, None]
    assert made[0] / made[0, 0, 0] == pytest.approx(scaled / scaled[0, 0], rel=1e-5)


@pytest.mark.parametrize("weight", [float("inf"), 3e38, 0.0])
def test_weights_without_a_finite_result_are_an_error(weight: float) -> None:
    with pytest.raises(WeightsOverflowError):
        MeanRestored(np.full((1, 3), weight, dtype=np.float32)).apply(np.full((1, 3, 2), 9.0, dtype=np.float32))
