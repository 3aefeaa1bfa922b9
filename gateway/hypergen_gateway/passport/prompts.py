"""The prompts of a passport: of a file, or the model's own suggestions, or some for any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypergen_gateway.passport.errors import PassportError

DEFAULT_COUNT = 8
MAX_COUNT = 1000
# As many characters as a request's prompt may have.
MAX_LENGTH = 32_000

# A face, hands, text, regular lines, fine texture, a dark scene, a flat drawing, several things: what suffers first.
PROMPTS = (
    "a close-up portrait of an old fisherman with a grey beard, natural light",
    "two hands shaping a clay bowl on a potter's wheel",
    "a shop window with a sign that says OPEN",
    "a long suspension bridge over a river, seen from the shore",
    "a fox standing in tall grass after the rain, photograph",
    "a narrow street at night, neon lights reflected in puddles",
    "a flat vector illustration of a lighthouse on a cliff",
    "a wooden table with a teapot, three cups, a lemon and an open book",
)


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank. Raises PassportError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PassportError(f"--prompts: {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PassportError(f"--prompts: {file}: not UTF-8 text") from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise PassportError(f"--prompts: {file}: no prompt in it; it must have one per line")
    if len(prompts) > MAX_COUNT:
        raise PassportError(f"--prompts: {file}: {len(prompts)} prompts; at most {MAX_COUNT} can be measured")
    long = next((number for number, prompt in enumerate(prompts, start=1) if len(prompt) > MAX_LENGTH), None)
    if long is not None:
        raise PassportError(f"--prompts: {file}: prompt {long} is longer than {MAX_LENGTH} characters")
    return prompts


def choose_prompts(given: Sequence[str], suggestions: Sequence[str], count: int | None) -> tuple[str, ...]:
    """`count` prompts, spread over those of the file, else over the model's suggestions, else the built-in ones.

    Without `count`, all of the file, or eight. Never more than there are.
    """
    prompts = given or suggestions or PROMPTS
    count = min(len(prompts), count or (len(given) if given else DEFAULT_COUNT))
    return tuple(prompts[index * len(prompts) // count] for index in range(count))
