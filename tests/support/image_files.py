"""Image files for tests of code that reads images."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from hypergen_gateway.generation.backend import Pixels


def ramp(width: int, height: int) -> Pixels:
    """RGB [height, width, 3] that differs everywhere: red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return pixels


def photo(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(ramp(width, height))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def hole(width: int = 64, height: int = 48, box: tuple[int, int, int, int] = (16, 8, 48, 40)) -> Image.Image:
    """An opaque black RGBA image with a transparent box: a mask as OpenAI wants it."""
    mask = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), box)
    return mask


def bomb(side: int) -> bytes:
    """A PNG of `side` × `side` grey pixels that takes a few kilobytes and would take side² bytes to decode."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    # Zeros alone, of which each megabyte compresses to the same bytes. Their Adler-32 is 1 and, above it, their number.
    length = side * (1 + side // 8)
    megabytes, rest = divmod(length, 1 << 20)
    packed = b"\x78\xda" + _zeros(1 << 20) * megabytes + _zeros(rest) + b"\x03\x00"
    packed += struct.pack(">HH", length % 65521, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@functools.cache
def _zeros(length: int) -> bytes:
    """A part of a deflate stream that stands for so many zeros."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return compressor.compress(bytes(length)) + compressor.flush(zlib.Z_FULL_FLUSH)
