"""Pixels survive the way into a file and out of one."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import Pixels
from hypergen_gateway.generation.images import FileFormat, FormatName, decode, encode
from support.color_profiles import DISPLAY_P3, SRGB, display_profile, grey_profile, press_profile, srgb_profile
from support.image_files import bomb, file_of, photo, ramp


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


def png_of_16_bits(pixels: np.ndarray[Any, Any]) -> bytes:
    """A PNG of RGB [height, width, 3], 16 bits each, which Pillow cannot write."""
    height, width, _ = pixels.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def opened(file: bytes) -> Image.Image:
    return decode(io.BytesIO(file), "image")


class TestDecoding:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_lossless_files_give_their_pixels(self, kind: str) -> None:
        assert np.array_equal(np.asarray(opened(file_of(photo(), kind, lossless=True))), ramp(64, 48))

    def test_a_jpeg_gives_nearly_its_pixels(self) -> None:
        decoded = np.asarray(opened(file_of(photo(), "JPEG", quality=95)), dtype=int)
        assert np.abs(decoded - ramp(64, 48)).max() < 20

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
    def test_opaque_images_become_rgb(self, mode: str) -> None:
        image = photo().convert(mode)
        decoded = opened(file_of(image, "JPEG" if mode == "CMYK" else "PNG"))
        assert (decoded.mode, decoded.size) == ("RGB", (64, 48))
        expected = np.asarray(image.convert("RGB"), dtype=int)
        assert np.abs(np.asarray(decoded, dtype=int) - expected).max() < (20 if mode == "CMYK" else 1)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_becomes_alpha(self, mode: str) -> None:
        clear = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
        clear.paste((255, 255, 255, 255), (32, 0, 64, 48))
        image = clear.quantize() if mode == "P" else clear.convert(mode)
        decoded = opened(file_of(image))
        assert decoded.mode == "RGBA"
        assert (decoded.getpixel((0, 0)), decoded.getpixel((63, 0))) == ((0, 0, 0, 0), (255, 255, 255, 255))

    def test_a_colour_that_means_transparent_becomes_alpha(self) -> None:
        decoded = opened(file_of(photo().convert("L"), transparency=0))
        assert (decoded.mode, decoded.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 0))

    def test_sixteen_bits_of_grey_are_scaled_rather_than_clipped(self) -> None:
        deep = np.linspace(0, 65535, 64, dtype=np.uint16)[None, :].repeat(48, axis=0)
        decoded = np.asarray(opened(file_of(Image.fromarray(deep))))
        assert decoded.shape == (48, 64, 3)
        assert np.array_equal(decoded[0, :, 0], deep[0] >> 8)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_a_photograph_taken_on_its_side_is_turned_upright(self, kind: str) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise to see it right
        decoded = opened(file_of(photo(), kind, exif=exif, quality=95))
        assert decoded.size == (48, 64)
        red, green, _ = np.asarray(decoded, dtype=int)[0, 0]
        assert red < 20
        assert green > 235

    def test_exif_that_nobody_can_read_is_no_obstacle(self) -> None:
        assert opened(file_of(photo(), "JPEG", exif=b"Exif\0\0rubbish")).size == (64, 48)

    def test_the_first_frame_of_a_moving_image_is_taken(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        decoded = opened(file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
        assert decoded.getpixel((0, 0)) == (255, 0, 0)

    def test_a_gif_gives_its_first_frame_with_its_transparency(self) -> None:
        frames = [Image.new("P", (8, 8), index) for index in (1, 2)]
        for frame in frames:
            frame.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
        frames[0].putpixel((3, 0), 0)
        decoded = opened(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0))
        assert decoded.mode == "RGBA"
        assert decoded.getpixel((0, 0)) == (255, 0, 0, 255)
        assert decoded.getpixel((3, 0)) == (0, 0, 0, 0)
        opaque = opened(file_of(photo().quantize(), "GIF"))
        assert (opaque.mode, opaque.size) == ("RGB", (64, 48))

    def test_an_avif_gives_its_pixels_upright_and_its_transparency(self) -> None:
        plain = opened(file_of(photo(), "AVIF", quality=100, subsampling="4:4:4"))
        assert plain.mode == "RGB"
        assert np.abs(np.asarray(plain, dtype=int) - ramp(64, 48)).max() < 12
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = opened(file_of(photo(), "AVIF", exif=exif, quality=100))
        assert turned.size == (48, 64)
        red, green, _ = np.asarray(turned, dtype=int)[0, 0]
        assert red < 30
        assert green > 225
        clear = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
        clear.paste((255, 255, 255, 255), (32, 0, 64, 48))
        decoded = opened(file_of(clear, "AVIF", quality=100))
        assert [decoded.getchannel("A").getpixel(at) for at in ((0, 0), (63, 0))] == [0, 255]

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            *((file_of(photo(), kind), kind) for kind in ("BMP", "TIFF", "ICO", "PDF", "JPEG2000", "PPM")),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
            (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
            (b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2", "MP4"),
            (b"\xff\x0a\xfa\x7f", "JPEG XL"),
            (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
            (b"8BPS\0\x01", "PSD"),
            (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
            (b"\n<svg>", "SVG"),
        ],
    )
    def test_other_kinds_of_files_are_named_beside_those_that_are_taken(self, content: bytes, name: str) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            opened(content)
        assert refused.value.message == f"The file in 'image' is {name}. It must be PNG, JPEG, WebP, AVIF or GIF."

    @pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100])
    def test_what_is_no_image_is_said_to_be_none(self, content: bytes) -> None:
        with pytest.raises(InvalidRequestError, match=r"is not an image\. It must be PNG, JPEG, WebP, AVIF or GIF\."):
            opened(content)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF"])
    def test_a_mask_of_another_kind_is_named(self, kind: str) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            decode(io.BytesIO(file_of(photo(), kind)), "mask", formats=("PNG",))
        name = {"WEBP": "WebP"}.get(kind, kind)
        assert refused.value.message == f"The file in 'mask' is {name}. It must be PNG."

    @pytest.mark.parametrize("chunk", ["iCCP", "zTXt", "iTXt"])
    def test_large_metadata_is_no_obstacle(self, chunk: str) -> None:
        texts = PngInfo()
        if chunk == "zTXt":
            texts.add_text("edits", "x" * (2 << 20), zip=True)
        elif chunk == "iTXt":
            texts.add_itxt("edits", "x" * (2 << 20), zip=True)
        profile = bytes(2 << 20) if chunk == "iCCP" else None
        assert np.array_equal(np.asarray(opened(file_of(photo(), pnginfo=texts, icc_profile=profile))), ramp(64, 48))

    def test_metadata_that_would_fill_the_memory_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="corrupt"):
            opened(file_of(photo(), icc_profile=bytes(64 << 20)))

    @pytest.mark.parametrize("missing", [1, 2])
    def test_a_jpeg_that_lacks_its_end_alone_is_said_to_be_cut_off(self, missing: int) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            opened(file_of(photo(200, 150), "JPEG")[:-missing])
        assert refused.value.message == "The JPEG file in 'image' is corrupt or truncated."

    def test_sixteen_bits_of_colour_lose_their_lower_half(self) -> None:
        deep = np.stack([np.linspace(0, 65535, 64, dtype=np.uint16)] * 3, axis=1)[None].repeat(48, axis=0)
        file = png_of_16_bits(deep)
        assert np.array_equal(np.asarray(opened(file)), deep >> 8)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
    @pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
    def test_a_file_that_is_cut_off_is_refused_wherever_the_cut_is(self, kind: str, share: float) -> None:
        whole = file_of(photo(200, 150), kind)
        with pytest.raises(InvalidRequestError) as raised:
            opened(whole[: int(len(whole) * share)])
        assert raised.value.param == "image"

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
    def test_whatever_is_broken_in_a_file_it_is_an_image_or_our_error(self, kind: str) -> None:
        random = np.random.default_rng(0)
        whole = np.frombuffer(file_of(photo(), kind), dtype=np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[random.integers(0, len(whole), 4)] = random.integers(0, 256, 4)
            with suppress(InvalidRequestError):
                assert opened(broken.tobytes()).mode in ("RGB", "RGBA")

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [4104, 10_000, 30_000])
    def test_a_decompression_bomb_is_refused_before_it_is_decoded(self, side: int) -> None:
        file = bomb(side)
        began = time.perf_counter()
        with pytest.raises(InvalidRequestError, match="more than 16,777,216 pixels"):
            opened(file)
        assert time.perf_counter() - began < 0.5

    def test_a_file_of_fifty_megabytes_is_refused_unread(self) -> None:
        class Huge(io.BytesIO):
            def seek(self, offset: int, whence: int = 0) -> int:
                return 50_000_000 if whence == io.SEEK_END else super().seek(offset, whence)

        with pytest.raises(InvalidRequestError, match="smaller than 50 MB"):
            decode(Huge(file_of(photo())), "image")


def as_srgb(linear: Any) -> Any:
    """The 8-bit values of linear light from 0 to 1."""
    light = np.clip(linear, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


class TestColourProfiles:
    """Results have no profile, so what they keep of an image must be in sRGB."""

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_the_colours_of_a_phone_stay_what_they_are(self, kind: str) -> None:
        colour = np.array([200, 60, 90])
        image = Image.fromarray(np.full((16, 16, 3), colour, dtype=np.uint8))
        profile = display_profile(DISPLAY_P3, gamma=2.2)
        decoded = opened(file_of(image, kind, icc_profile=profile, quality=98, lossless=True))
        expected = as_srgb(np.linalg.inv(SRGB) @ DISPLAY_P3 @ (colour / 255) ** 2.2)
        assert np.abs(expected - colour).max() > 10
        assert np.abs(np.asarray(decoded)[8, 8] - expected).max() < 3

    def test_what_is_in_srgb_stays_the_same_to_the_pixel(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        decoded = opened(file_of(Image.fromarray(noise), icc_profile=srgb_profile()))
        assert np.array_equal(np.asarray(decoded), noise)

    def test_transparent_and_indexed_images_have_them_too(self) -> None:
        profile = display_profile(DISPLAY_P3, gamma=2.2)
        plain = opened(file_of(Image.new("RGB", (8, 8), (200, 60, 90)), icc_profile=profile))
        clear = Image.new("RGBA", (8, 8), (200, 60, 90, 77))
        indexed = Image.new("P", (8, 8))
        indexed.putpalette([200, 60, 90])
        assert opened(file_of(clear, icc_profile=profile)).getpixel((0, 0)) == (*np.asarray(plain)[0, 0], 77)
        assert opened(file_of(indexed, icc_profile=profile)).getpixel((0, 0)) == plain.getpixel((0, 0))

    @pytest.mark.parametrize("depth", [8, 16])
    def test_greyscale_has_its_own(self, depth: int) -> None:
        value = 64 if depth == 8 else 64 << 8
        image = Image.fromarray(np.full((8, 8), value, dtype=np.uint8 if depth == 8 else np.uint16))
        decoded = opened(file_of(image, icc_profile=grey_profile(gamma=1.0)))
        assert decoded.mode == "RGB"
        assert np.abs(np.asarray(decoded) - as_srgb(64 / 255)).max() < 2

    def test_inks_look_as_on_their_press(self) -> None:
        cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
        profile = press_profile({(1, 0, 0, 0): 50})
        decoded = opened(file_of(cyan, "JPEG", quality=98, icc_profile=profile))
        assert decoded.mode == "RGB"
        assert np.abs(np.asarray(decoded, dtype=int)[8, 8] - 119).max() < 4  # grey of half the lightness

    @pytest.mark.parametrize("profile", [b"rubbish", grey_profile(1.0), press_profile({}), srgb_profile()[:200]])
    def test_a_profile_that_does_not_fit_changes_nothing(self, profile: bytes) -> None:
        assert np.array_equal(np.asarray(opened(file_of(photo(), icc_profile=profile))), ramp(64, 48))
