"""Pixels to files. Knows Pillow; blocks, so it is called in a thread."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from hypergen_gateway.generation import Pixels

FormatName = Literal["png", "jpeg", "webp"]

# Chroma is kept at full resolution from here on: below, nobody who asks for a small file misses it.
_FULL_CHROMA = 90


@dataclass(frozen=True)
class FileFormat:
    """A kind of image file.

    `compression` is OpenAI's `output_compression`, 0 to 100: for JPEG and WebP the encoder's quality, where 100 loses
    least and is largest and 0 is smallest. PNG loses nothing and has no such dial.
    """

    name: FormatName = "png"
    compression: int = 100

    @property
    def media_type(self) -> str:
        """What a `Content-Type` calls it."""
        return f"image/{self.name}"


PNG = FileFormat()


def encode(pixels: Pixels, file_format: FileFormat = PNG) -> bytes:
    """A file of RGB pixels [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=file_format.name.upper(), **_options(file_format))
    return buffer.getvalue()


def _options(file_format: FileFormat) -> dict[str, Any]:
    quality = file_format.compression
    match file_format.name:
        case "jpeg":
            return {"quality": quality, "subsampling": "4:4:4" if quality >= _FULL_CHROMA else "4:2:0"}
        case "webp":
            return {"quality": quality}
        case "png":
            return {}
