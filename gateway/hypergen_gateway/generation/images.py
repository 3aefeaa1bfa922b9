"""Encoding and decoding of image files with Pillow. These functions block, so call them in a thread."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import Pixels
from hypergen_gateway.generation.color_profiles import to_srgb
from hypergen_gateway.generation.sizes import LONGEST_SIDE

FormatName = Literal["png", "jpeg", "webp"]

# zlib's default of 6 takes a third longer for 2 % fewer bytes, and three times as long for a small image.
_PNG_EFFORT = 4
# From this quality on, chroma has full resolution; below it, a small file matters more.
_FULL_CHROMA = 90


@dataclass(frozen=True)
class FileFormat:
    """An image file format, with its compression.

    `compression` is OpenAI's `output_compression`, from 0 to 100. For JPEG and WebP it is the encoder's quality: 100
    loses least and gives the largest file, 0 the smallest. PNG is lossless and ignores it.
    """

    name: FormatName = "png"
    compression: int = 100

    @property
    def media_type(self) -> str:
        """The media type, for `Content-Type`."""
        return f"image/{self.name}"


PNG = FileFormat()

# Files must be smaller than this, as for OpenAI, and images must not have more pixels than this.
MAX_FILE_BYTES = 50 * 1000 * 1000
MAX_PIXELS = 4096 * 4096
# Of a PNG's compressed profile or text; profiles of displays and descriptions of edits exceed Pillow's megabyte.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF")
# The usual spelling of a format, by Pillow's name, where the two differ.
_NAMES = {"WEBP": "WebP"}
# Signatures of files that are sent as images. An error names the format of an unsupported file, which is not decoded.
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
    """Encodes RGB pixels [height, width, 3] as a file."""
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
    """Decodes an untrusted file to an upright 8-bit image in sRGB: RGBA if it has transparency, else RGB.

    The format is detected from the content. Only the first frame of an animation is decoded.

    Raises:
        InvalidRequestError: the file is too large, of another format or broken, or has too many pixels.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size >= MAX_FILE_BYTES:
        raise InvalidRequestError(f"The file in '{param}' is too large: it must be smaller than 50 MB.", param)
    kind = _kind_of(file.read(_HEAD_BYTES))
    file.seek(0)
    with _translate_pillow_errors(param, formats, kind):
        image = Image.open(file, formats=formats)
        # The size is known before any pixel is decoded. The response may have the same size, and must fit into a file.
        if image.width * image.height > MAX_PIXELS or max(image.size) > LONGEST_SIDE:
            raise Image.DecompressionBombError
        image.load()
        return _to_rgb(_upright(image))


def _kind_of(head: bytes) -> str | None:
    return next((name for start, name in _KINDS if start.match(head)), None)


@contextmanager
def _translate_pillow_errors(param: str, formats: tuple[str, ...], kind: str | None) -> Iterator[None]:
    """Turns Pillow's errors into ours: on malicious files, it raises far more than it documents.

    A truncated file is rejected even if all of its pixels may be there, as in a JPEG without its last two bytes: there
    is no way to tell what else is missing.
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
    return f"The {kind or 'image'} file in '{param}' is corrupt or truncated."


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # cameras and editors write malformed EXIF; the image is intact all the same
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip rather than scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    own = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA") else "RGB"
    if not image.has_transparency_data:
        return to_srgb(image.convert(own), profile)
    whole = image.convert("RGBA")
    colours = to_srgb(whole.convert(own), profile)
    colours.putalpha(whole.getchannel("A"))
    return colours
