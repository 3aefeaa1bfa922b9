"""Pixels to files. Knows Pillow; blocks, so it is called in a thread."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of RGB pixels [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def to_base64_png(pixels: NDArray[np.uint8]) -> str:
    """A PNG file as base64 text."""
    return base64.b64encode(to_png(pixels)).decode("ascii")
