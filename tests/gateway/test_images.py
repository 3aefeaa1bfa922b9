"""Pixels survive the way into a file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.generation import Pixels
from hypergen_gateway.images import FileFormat, FormatName, encode


@pytest.fixture
def pixels() -> Pixels:
    """A grey gradient with noise: what JPEG and WebP are made for, and not trivial."""
    ramp = np.linspace(0, 200, 64, dtype=np.float64)
    noise = np.random.default_rng(0).uniform(0, 50, (48, 64))
    return np.stack([(ramp + noise).astype(np.uint8)] * 3, axis=2)


def read(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def test_a_png_holds_the_same_pixels(pixels: Pixels) -> None:
    decoded = read(encode(pixels))
    assert (decoded.format, decoded.size) == ("PNG", (64, 48))
    assert np.array_equal(np.asarray(decoded), pixels)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_compression_is_quality_from_small_to_close(pixels: Pixels, name: FormatName) -> None:
    files = [encode(pixels, FileFormat(name, compression)) for compression in (0, 50, 100)]
    errors = [np.abs(np.asarray(read(file).convert("RGB"), dtype=int) - pixels).mean() for file in files]
    assert {read(file).format for file in files} == {name.upper()}
    assert len(files[0]) < len(files[1]) < len(files[2])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 3


def test_the_best_jpeg_keeps_thin_coloured_lines() -> None:
    lines = np.zeros((32, 32, 3), dtype=np.uint8)
    lines[:, ::2, 0] = 255
    decoded = np.asarray(read(encode(lines, FileFormat("jpeg", 100))), dtype=int)
    assert np.abs(decoded - lines).max() < 10


def test_a_format_knows_its_media_type() -> None:
    assert FileFormat("webp").media_type == "image/webp"
