"""Pixels to files, and files to pixels. Knows Pillow; blocks, so it is called in a thread."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import Pixels
from hypergen_gateway.generation.sizes import LONGEST_SIDE

FormatName = Literal["png", "jpeg", "webp"]

# zlib's own 6 takes a third longer for 2 % fewer bytes, and of a small picture three times as long.
_PNG_EFFORT = 4
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

# Files are read that are smaller than this, as OpenAI does, and images that have no more pixels than this.
MAX_FILE_BYTES = 50 * 1000 * 1000
MAX_PIXELS = 4096 * 4096
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF")
# By Pillow's names, where people write them otherwise.
_NAMES = {"WEBP": "WebP"}
# How files begin that people take for images; whoever sends one learns what it is, and nothing more of it is read.
_KINDS = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|m[is]f1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftyp", re.DOTALL), "MP4"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG2000"),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"\0\0[\1\2]\0"), "ICO"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"P[1-7]\s"), "PPM"),
    (re.compile(rb"%PDF-"), "PDF"),
    (re.compile(rb"\s*(<\?xml.*)?<svg[\s>]", re.DOTALL | re.IGNORECASE), "SVG"),
)
_HEAD_BYTES = 512


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
            return {"compress_level": _PNG_EFFORT}


def decode(file: BinaryIO, param: str, formats: tuple[str, ...] = _READ_FORMATS) -> Image.Image:
    """The image in a file that anybody may have sent: RGBA if it has transparency, else RGB; upright, 8 bits.

    What a file is, its content says. The first frame of a moving picture is taken.

    Raises:
        InvalidRequestError: the file is too large, of another kind or broken, or has too many pixels.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size >= MAX_FILE_BYTES:
        raise InvalidRequestError(f"The file in '{param}' is too large: it must be smaller than 50 MB.", param)
    kind = _kind_of(file.read(_HEAD_BYTES))
    file.seek(0)
    with _refusing_rubbish(param, formats, kind):
        image = Image.open(file, formats=formats)
        # Known before any pixel is decoded. What is answered has the image's own sides, and must be a file again.
        if image.width * image.height > MAX_PIXELS or max(image.size) > LONGEST_SIDE:
            raise Image.DecompressionBombError
        image.load()
        return _to_rgb(_upright(image))


def _kind_of(head: bytes) -> str | None:
    return next((name for start, name in _KINDS if start.match(head)), None)


@contextmanager
def _refusing_rubbish(param: str, formats: tuple[str, ...], kind: str | None) -> Iterator[None]:
    """Where Pillow's errors become ours: on files made to confuse it, it raises far more than it promises.

    A file that is cut off is refused even if all of its pixels could be there, as of a JPEG that lacks its last two
    bytes: nobody can tell what else is missing.
    """
    names = [_NAMES.get(name, name) for name in formats]
    legal = f"It must be {' or '.join(', '.join(names).rsplit(', ', 1))}."
    try:
        yield
    except Image.DecompressionBombError as error:
        limit = f"{MAX_PIXELS:,} pixels, or {LONGEST_SIDE:,} a side"
        raise InvalidRequestError(f"The image in '{param}' has more than {limit}.", param) from error
    except UnidentifiedImageError as error:
        what = "not an image" if kind is None else kind
        message = f"The file in '{param}' is {what}. {legal}"
        raise InvalidRequestError(_broken(param, kind) if kind in names else message, param) from error
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidRequestError(_broken(param, kind), param) from error


def _broken(param: str, kind: str | None) -> str:
    return f"The {kind or 'image'} file in '{param}' is broken or cut off: send all of it."


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # cameras and editors write EXIF that nobody can read; the picture is there all the same
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
