"""The judge: true renderings pass, others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from PIL import Image

import evaluate
from evaluate import Request, Task, contact_sheet, random_tasks, score
from world import COLOUR_NAMES, COLOURS, FONT, PLACEMENTS, colour_table, compose, cutout, emoji_list

pytestmark = pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")


@pytest.fixture(autouse=True)
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for these tests, in a hundredth of the time."""
    monkeypatch.setattr(evaluate, "PLACES", PLACEMENTS[:1])
    evaluate.renderings.cache_clear()
    evaluate._lengths.cache_clear()
    evaluate._cuts.cache_clear()


def true_image(emoji: int, colour: int) -> Image.Image:
    cut = cutout(emoji_list()[emoji].character, PLACEMENTS[0])
    image = compose(cut[None], colour_table()[colour][None])[0]
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


class Perfect:
    """Generates what the task of that seed asks for."""

    def __init__(self, tasks: Sequence[Task], emoji_off: int = 0, colour_off: int = 0) -> None:
        self._tasks = {task.request.seed: task for task in tasks}
        self._emoji_off, self._colour_off = emoji_off, colour_off

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        return [self._generate(self._tasks[one.seed]) for one in requests]

    def _generate(self, task: Task) -> Image.Image:
        emoji = (task.emoji + self._emoji_off) % len(emoji_list())
        return true_image(emoji, (task.colour + self._colour_off) % len(COLOUR_NAMES))


def test_true_renderings_score_full_marks() -> None:
    tasks = random_tasks(24, 0)
    result = score(Perfect(tasks), tasks)
    assert (result.emoji, result.colour, result.both) == (1, 1, 1)
    assert result.rmse < 0.01


def test_other_emoji_are_noticed() -> None:
    tasks = random_tasks(24, 0)
    result = score(Perfect(tasks, emoji_off=1), tasks)
    assert result.emoji == 0
    assert result.colour == 1
    assert result.rmse > 0.1


def test_other_backgrounds_are_noticed() -> None:
    tasks = random_tasks(24, 0)
    assert score(Perfect(tasks, colour_off=1), tasks).colour == 0


def test_without_a_colour_in_the_prompt_any_will_do() -> None:
    tasks = [replace(random_tasks(1, 0)[0], colour=-1)]
    image = evaluate.pixels(true_image(tasks[0].emoji, 4))
    assert evaluate.seen_colour(image) == 4
    assert evaluate.judge(image, 4, tasks[0]).emoji == tasks[0].emoji


def test_the_tasks_of_a_seed_are_always_the_same() -> None:
    assert random_tasks(5, 9) == random_tasks(5, 9)


def test_the_contact_sheet_has_a_cell_for_every_image() -> None:
    image = Image.new("RGB", (64, 64), COLOURS["blue"])
    sheet = contact_sheet([image] * 9, ["a line"] * 9)
    cell = evaluate.SHEET_CELL
    assert sheet.width == 8 * cell
    assert sheet.getpixel((cell // 2, cell + evaluate.SHEET_LINE + cell // 2)) == COLOURS["blue"]
