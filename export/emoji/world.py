"""The images the model learns: an emoji on a plain background of a named colour.

Knows the list of emoji, the colours, the sizes and places an emoji is drawn at, and how an image is composed of
them. Knows nothing of captions or of models. Everything is a pure function of its arguments, so the training and
the evaluation see the same world.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path(__file__).with_name("emoji.txt")
BITMAP_SIZE = 109  # the only size of NotoColorEmoji's bitmaps
GLYPH_SIDE = 136
NATIVE_SIDE = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 20),
    "red": (200, 24, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 60),
    "green": (40, 150, 60),
    "blue": (40, 90, 215),
    "purple": (130, 50, 170),
}
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Emoji:
    """One thing the model can draw: its character and the names it answers to, the usual one first."""

    character: str
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Placement:
    """Where the emoji lies in an image at native size: the glyph's side and its shift from the middle, in pixels."""

    side: int
    right: int = 0
    down: int = 0


# Two, and far apart: a seed chooses between them, where many that hardly differ would blur each other.
PLACEMENTS = (Placement(56), Placement(44))


@cache
def emoji_list(path: Path = EMOJI_LIST) -> tuple[Emoji, ...]:
    """The lines of emoji.txt: a character, a space, its name, further names after `|`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines if line.strip())
    return tuple(Emoji(character, tuple(names.split("|"))) for character, names in pairs)


def held_out_colour(emoji: int) -> int:
    """The one colour an emoji is never shown on in training (indices); measures whether the two are told apart."""
    return (emoji * 3 + 1) % len(COLOUR_NAMES)


@cache
def glyph(character: str) -> Image.Image:
    """The emoji as the font has it, centred on a transparent square."""
    font = ImageFont.truetype(str(FONT), BITMAP_SIZE)
    drawn = Image.new("RGBA", (2 * GLYPH_SIDE, 2 * GLYPH_SIDE))
    ImageDraw.Draw(drawn).text((GLYPH_SIDE // 2, GLYPH_SIDE // 2), character, font=font, embedded_color=True)
    box = drawn.getbbox()
    if box is None:
        raise ValueError(f"{FONT.name} has no image of {character!r}")
    cut = drawn.crop(box)
    square = Image.new("RGBA", (GLYPH_SIDE, GLYPH_SIDE))
    square.paste(cut, ((GLYPH_SIDE - cut.width) // 2, (GLYPH_SIDE - cut.height) // 2))
    return square


def cutout(character: str, placement: Placement, size: tuple[int, int] = (NATIVE_SIDE, NATIVE_SIDE)) -> Tensor:
    """uint8 [4, H, W]: the emoji in a transparent image of size (width, height), scaled with its short side."""
    scale = min(size) / NATIVE_SIDE
    side = round(placement.side * scale)
    small = glyph(character).resize((side, side), Image.Resampling.LANCZOS)
    image = Image.new("RGBA", size)
    left = (size[0] - side) // 2 + round(placement.right * scale)
    top = (size[1] - side) // 2 + round(placement.down * scale)
    image.paste(small, (left, top))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def cutouts(
    emoji: tuple[Emoji, ...],
    placements: tuple[Placement, ...] = PLACEMENTS,
    size: tuple[int, int] = (NATIVE_SIDE, NATIVE_SIDE),
) -> Tensor:
    """uint8 [emoji, placements, 4, H, W]: all of them at one size."""
    rows = [torch.stack([cutout(one.character, place, size) for place in placements]) for one in emoji]
    return torch.stack(rows)


def colour_table() -> Tensor:
    """float32 [colours, 3] in 0..1."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255


def compose(cut: Tensor, colours: Tensor) -> Tensor:
    """Cutouts uint8 [N, 4, H, W] over backgrounds float [N, 3] in 0..1: float32 [N, 3, H, W] in 0..1."""
    pixels = cut.float() / 255
    alpha = pixels[:, 3:]
    return pixels[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)
