"""From uploaded images to what the model starts from, and from what it drew back to the image.

Knows sizes: which legal one is nearest to an image's own, and how image and mask get there and back. Knows what a mask
is to OpenAI: transparent pixels are drawn anew. Blocks, so it is called in a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation import ModelDescription, Pixels
from hypergen_gateway.images import decode

# Pixels less opaque than this are drawn anew.
_OPAQUE = 128
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Uploads:
    """The images of a request and the mask of the first of them, with the names by which the client knows them."""

    images: Sequence[BinaryIO]
    mask: BinaryIO | None
    images_param: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Retouch:
    """What makes a drawn picture one of the size that the client expects, unchanged where nothing was to be drawn."""

    size: Size
    kept: Pixels | None  # RGB [height, width, 3] in `size`
    mask: Pixels | None  # [height, width]; 255 where the drawn picture shows, 0 where `kept` does

    def apply(self, pixels: Pixels) -> Pixels:
        """The picture in RGB, [height, width, 3] of `size`."""
        height, width, _ = pixels.shape
        if (width, height) != self.size:
            pixels = np.asarray(Image.fromarray(pixels).resize(self.size, Image.Resampling.LANCZOS))
        if self.kept is None or self.mask is None:
            return pixels
        return np.where(self.mask[..., None] > 0, pixels, self.kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What pictures start from: RGB [height, width, 3] in a size that the model draws, and its mask."""

    image: Pixels
    mask: Pixels | None  # [height, width]; 255 is repainted, 0 stays
    retouch: Retouch


def open_starts(uploads: Uploads, asked: Size | None, model: ModelDescription, needed: int) -> list[Start]:
    """The first `needed` images made ready; all of them are looked at, so that a broken one is always told.

    Raises:
        InvalidRequestError: with the name of the image's or the mask's field as `param`.
    """
    starts = []
    for number, file in enumerate(uploads.images):
        image = decode(file, uploads.images_param)
        mask = None
        if number == 0 and uploads.mask is not None:
            mask = _read_mask(uploads.mask, image)
        elif image.mode == "RGBA":
            mask = _transparency(image)
        if number < needed:
            starts.append(_start(_flat(image), mask, asked, model))
    return starts


def nearest_size(own: Size, model: ModelDescription) -> Size:
    """The legal size nearest to an image's own, in its proportions as far as there is one."""
    if model.sizes:
        built = [(int(width), int(height)) for width, height in (size.split("x") for size in model.sizes)]
        return min(built, key=lambda size: (_distortion(size, own), _growth(size, own)))
    smallest, largest = sorted(own)
    scale = min(max(1.0, model.min_size / smallest), model.max_size / largest)
    width, height = (_nearest_side(side * scale, model) for side in own)
    return width, height


def _nearest_side(side: float, model: ModelDescription) -> int:
    multiple = math.floor(side / model.size_factor + 0.5) * model.size_factor
    return min(max(multiple, model.min_size), model.max_size)


def _distortion(size: Size, own: Size) -> float:
    """How far proportions are apart; small differences count as none, so that the number of pixels decides."""
    return round(abs(math.log(size[0] * own[1] / (size[1] * own[0]))), 1)


def _growth(size: Size, own: Size) -> float:
    return abs(math.log(size[0] * size[1] / (own[0] * own[1])))


def _read_mask(file: BinaryIO, image: Image.Image) -> Image.Image:
    mask = decode(file, "mask", formats=("PNG",))
    if mask.size != image.size:
        sizes = f"{mask.width}x{mask.height} instead of {image.width}x{image.height}"
        raise InvalidRequestError(f"The mask must have the size of the first image: it is {sizes}.", "mask")
    repainted = _transparency(mask) if mask.mode == "RGBA" else None
    if repainted is None:
        raise InvalidRequestError(
            "The mask has no transparent pixels. It must be a PNG whose alpha is 0 where the image is drawn anew.",
            "mask",
        )
    return repainted


def _transparency(image: Image.Image) -> Image.Image | None:
    """The mask that an image's alpha makes: 255 where it is transparent, 0 elsewhere; None if it is nowhere."""
    mask = image.getchannel("A").point(lambda alpha: 0 if alpha >= _OPAQUE else 255)
    return mask if mask.getbbox() else None


def _flat(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white paper."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _start(image: Image.Image, mask: Image.Image | None, asked: Size | None, model: ModelDescription) -> Start:
    """An image in the size asked for, cut to its proportions; else in its own, by way of the nearest legal one."""
    if asked is not None:
        image = ImageOps.fit(image, asked, Image.Resampling.LANCZOS)
        mask = mask and ImageOps.fit(mask, asked, Image.Resampling.BOX)
    drawn = asked or nearest_size(image.size, model)
    retouch = Retouch(size=image.size, kept=np.asarray(image) if mask else None, mask=_binary(mask))
    return Start(
        image=np.asarray(image.resize(drawn, Image.Resampling.LANCZOS)),
        mask=_binary(mask and mask.resize(drawn, Image.Resampling.BOX)),
        retouch=retouch,
    )


def _binary(mask: Image.Image | None) -> Pixels | None:
    """255 wherever a pixel is to be drawn anew at least in part."""
    if mask is None:
        return None
    return np.where(np.asarray(mask) > 0, np.uint8(255), np.uint8(0))
