"""From uploaded images to what the model starts from, and from what it drew back to the image.

Knows how image and mask get into a size that the model draws, and how what is drawn gets back. Knows what a mask is to
OpenAI: transparent pixels are drawn anew. Blocks, so it is called in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription, Pixels
from hypergen_gateway.generation.images import decode
from hypergen_gateway.generation.sizes import Box, Size, SizePolicy, nearest_size, window

# Pixels less opaque than this are drawn anew.
_OPAQUE = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Uploads:
    """The images of a request and the mask of the first of them, with the names by which the client knows them."""

    images: Sequence[BinaryIO]
    mask: BinaryIO | None
    images_param: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Compositing:
    """What makes a drawn picture one of the size that the client expects, unchanged where nothing was to be drawn."""

    size: Size
    kept: Pixels | None = None  # RGB [height, width, 3] in `size`
    mask: Pixels | None = None  # [height, width]; 255 where the drawn picture shows, 0 where `kept` does

    def apply(self, pixels: Pixels) -> Pixels:
        """The picture in RGB, [height, width, 3] of `size`: scaled to cover it, and cut where proportions differ."""
        height, width, _ = pixels.shape
        if (width, height) != self.size:
            shown = window((width, height), self.size)
            pixels = np.asarray(Image.fromarray(pixels).resize(self.size, Image.Resampling.LANCZOS, box=shown))
        if self.kept is None or self.mask is None:
            return pixels
        return np.where(self.mask[..., None] > 0, pixels, self.kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class InitImage:
    """What pictures start from: RGB [height, width, 3] in a size that the model draws, and its mask."""

    image: Pixels
    mask: Pixels | None  # [height, width]; 255 is repainted, 0 stays
    retouch: Compositing


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What pictures are wanted of images: how many, and in which size, None being each image's own."""

    size: Size | None
    count: int
    may_stay: bool = False  # whether an image may come back as it is


def open_init_images(uploads: Uploads, wanted: Wanted, model: ModelDescription, sizes: SizePolicy) -> list[InitImage]:
    """As many images as pictures are wanted, made ready; all are looked at, so that a broken one is always told.

    The first image's own size may be asked for whatever the policy is: it is what is answered where none is.

    Raises:
        InvalidRequestError: with the name of the image's, the mask's or the size's field as `param`.
    """
    starts = []
    for number, file in enumerate(uploads.images):
        image = decode(file, uploads.images_param)
        if number == 0 and wanted.size not in (None, image.size):
            sizes.check(wanted.size, model)
        mask = None
        if number == 0 and uploads.mask is not None:
            mask = _read_mask(uploads.mask, image)
        elif image.mode == "RGBA":
            mask = _transparency(image)
        if number < wanted.count:
            starts.append(_start(_flat(image), mask, wanted, model))
    return starts


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


def _start(image: Image.Image, mask: Image.Image | None, wanted: Wanted, model: ModelDescription) -> InitImage:
    """An image in the size asked for, cut to its proportions, or in its own; made ready in the nearest drawn one."""
    if wanted.size is not None:
        image = ImageOps.fit(image, wanted.size, Image.Resampling.LANCZOS)
        mask = mask and ImageOps.fit(mask, wanted.size, Image.Resampling.BOX)
    drawn = nearest_size(image.size, model)
    shown = window(drawn, image.size)
    kept = np.asarray(image) if mask or wanted.may_stay else None
    retouch = Compositing(size=image.size, kept=kept, mask=_binary(mask))
    return InitImage(
        image=_framed(image, drawn, shown, Image.Resampling.LANCZOS),
        mask=_binary(mask and _framed(mask, drawn, shown, Image.Resampling.BOX)),
        retouch=retouch,
    )


def _framed(image: Image.Image, drawn: Size, shown: Box, resample: Image.Resampling) -> Pixels:
    """An image scaled into the part of a drawn one where it is shown. It is mirrored around that part: what the model
    sees there is like the image, and is cut off again.
    """
    left, top, right, bottom = shown
    scaled = np.asarray(image.resize((right - left, bottom - top), resample))
    around = [(top, drawn[1] - bottom), (left, drawn[0] - right), *[(0, 0)] * (scaled.ndim - 2)]
    return np.pad(scaled, around, mode="symmetric")


def _binary(mask: Image.Image | Pixels | None) -> Pixels | None:
    """255 wherever a pixel is to be drawn anew at least in part."""
    if mask is None:
        return None
    return np.where(np.asarray(mask) > 0, np.uint8(255), np.uint8(0))
