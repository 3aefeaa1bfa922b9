"""Pixels survive the way into a file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from hypergen_gateway.images import to_base64_png, to_png


def test_a_png_holds_the_same_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(to_png(pixels)))
    assert decoded.format == "PNG"
    assert decoded.size == (40, 24)
    assert np.array_equal(np.asarray(decoded), pixels)


def test_base64_is_that_of_the_png() -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    assert base64.b64decode(to_base64_png(pixels), validate=True) == to_png(pixels)
