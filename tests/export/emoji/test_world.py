"""The images the shipped model learns."""

from __future__ import annotations

import pytest
import torch

from world import COLOUR_NAMES, FONT, Placement, compose, cutout, emoji_list, held_out_colour

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")
PROMISED = {"rocket", "dog", "cat", "red apple", "banana", "pizza"}
PROMISED |= {"car", "bicycle", "sunflower", "cactus", "snowman", "red heart"}


def test_the_list_has_a_hundred_emoji_and_those_that_were_promised() -> None:
    names = {one.name for one in emoji_list()}
    assert len(names) == len(emoji_list()) >= 100
    assert names >= PROMISED


def test_no_name_means_two_emoji() -> None:
    names = [name for one in emoji_list() for name in one.names]
    assert len(names) == len(set(names))


def test_every_colour_is_held_out_for_some_emoji() -> None:
    assert {held_out_colour(index) for index in range(len(emoji_list()))} == set(range(len(COLOUR_NAMES)))


def test_composing_is_the_alpha_blend() -> None:
    cut = torch.tensor([[[[255]], [[0]], [[51]], [[51]]]], dtype=torch.uint8)
    blended = compose(cut, torch.tensor([[0.0, 1.0, 0.5]]))
    assert torch.allclose(blended.flatten(), torch.tensor([0.2, 0.8, 0.2 * 0.2 + 0.8 * 0.5]))


@needs_font
def test_the_font_has_an_image_of_every_emoji() -> None:
    for one in emoji_list():
        assert cutout(one.character, Placement(52, 0, 0))[3].float().mean() > 20, one.name


@needs_font
@pytest.mark.parametrize("size", [(48, 48), (96, 64), (64, 96)])
def test_an_emoji_scales_with_the_short_side_and_stays_in_the_middle(size: tuple[int, int]) -> None:
    alpha = cutout("🍊", Placement(52, 0, 0), size)[3] > 127
    rows, columns = alpha.any(1).nonzero(), alpha.any(0).nonzero()
    assert alpha.shape == (size[1], size[0])
    assert abs(int(rows.max() + rows.min()) - size[1]) <= 3
    assert abs(int(columns.max() + columns.min()) - size[0]) <= 3
    assert 0.6 * min(size) < int(columns.max() - columns.min()) < 0.9 * min(size)
