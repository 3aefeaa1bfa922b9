"""Colour profiles of image files. An image without one is sRGB, and so is every result.

Photographs of phones are often in Display P3, and images for print are in CMYK with the profile of a press: taken for
sRGB, their colours would be others than those that browsers and editors show.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# By this much, out of 255, the profiles differ that editors and cameras write for sRGB itself.
_ROUNDING = 2


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image, which is in RGB, L or CMYK, as RGB in sRGB.

    Its values stay as they are without a profile, with one of sRGB, and, as in browsers, with one of no use: malformed,
    or for other channels.
    """
    with suppress(Exception):  # more than littlecms documents
        if profile:
            return _convert(image, profile)
    return image.convert("RGB")


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    """Raises PyCMSError, OSError."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if source.profile.xcolor_space.strip() == "RGB":
        image = image.convert("RGB")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    if image.mode != "CMYK" and _is_srgb(transform, image.mode):
        return image.convert("RGB")
    return _applied(transform, image)


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform leaves colours as they are."""
    levels = np.arange(256) if mode == "L" else np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), axis=-1)
    colours = Image.fromarray(levels.reshape(16, -1, *levels.shape[3:]).astype(np.uint8))
    return bool((np.abs(_values(_applied(transform, colours)) - _values(colours.convert("RGB"))) <= _ROUNDING).all())


def _values(image: Image.Image) -> Any:
    return np.asarray(image, dtype=int)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    made = ImageCms.applyTransform(image, transform)
    assert made is not None  # as it is not in place
    return made
