"""From uploaded images to the model's input, and back."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription
from hypergen_gateway.generation.image_inputs import InitImage, InitImageOptions, Uploads, read_init_images
from hypergen_gateway.generation.sizes import SizePolicy
from support.fake_backend import MODEL
from support.image_files import file_of, hole, photo, ramp

BUILT = replace(MODEL, sizes=("512x512", "768x512", "512x768"))


def starts(
    *images: bytes, mask: bytes | None = None, asked: Any = None, needed: int = 16, model: ModelDescription = MODEL
) -> list[InitImage]:
    uploads = Uploads(
        images=[io.BytesIO(image) for image in images],
        mask=None if mask is None else io.BytesIO(mask),
        images_param="image",
    )
    return read_init_images(uploads, InitImageOptions(size=asked, count=needed), model, SizePolicy())


def test_an_image_of_a_legal_size_arrives_pixel_by_pixel() -> None:
    (start,) = starts(file_of(photo(64, 48)))
    assert np.array_equal(start.image, ramp(64, 48))
    assert start.mask is None
    generated = np.full((48, 64, 3), 7, dtype=np.uint8)
    assert start.compositing.apply(generated) is generated


def test_another_image_is_native_in_a_legal_size_and_comes_back_in_its_own() -> None:
    (start,) = starts(file_of(photo(501, 333)))
    assert start.image.shape == (336, 504, 3)
    assert np.abs(start.image[::48, ::72].astype(int) - ramp(504, 336)[::48, ::72]).max() < 4
    back = start.compositing.apply(start.image)
    assert back.shape == (333, 501, 3)
    assert np.abs(back.astype(int) - ramp(501, 333)).mean() < 1


def test_with_a_size_the_image_is_cut_to_its_proportions_from_the_middle() -> None:
    (start,) = starts(file_of(photo(96, 48)), asked=(48, 48))
    assert np.array_equal(start.image, ramp(96, 48)[:, 24:72])
    assert start.compositing.size == (48, 48)


def test_the_mask_is_255_where_it_is_transparent_and_everything_else_stays_to_the_pixel() -> None:
    (start,) = starts(file_of(photo()), mask=file_of(hole(box=(16, 8, 48, 40))))
    expected = np.zeros((48, 64), dtype=np.uint8)
    expected[8:40, 16:48] = 255
    assert start.mask is not None
    assert np.array_equal(start.mask, expected)
    result = start.compositing.apply(np.full((48, 64, 3), 7, dtype=np.uint8))
    assert np.array_equal(result, np.where(expected[..., None] > 0, np.uint8(7), ramp(64, 48)))


def test_what_stays_is_the_image_itself_even_where_it_was_generated_in_another_size() -> None:
    (start,) = starts(file_of(photo(501, 333)), mask=file_of(hole(501, 333, (100, 100, 101, 101))))
    assert start.mask is not None
    assert start.mask.shape == (336, 504)
    assert start.mask.max() == 255  # a single pixel does not get lost on the way
    result = start.compositing.apply(np.full((336, 504, 3), 7, dtype=np.uint8))
    changed = (result != ramp(501, 333)).any(axis=2)
    assert (changed.sum(), changed[100, 100]) == (1, True)


def test_with_a_size_the_mask_is_cut_as_the_image_is() -> None:
    (start,) = starts(file_of(photo(96, 48)), mask=file_of(hole(96, 48, (0, 0, 48, 48))), asked=(48, 48))
    assert start.mask is not None
    assert np.array_equal(start.mask[0] > 0, np.arange(48) < 24)


def test_the_transparent_part_of_an_image_is_its_mask_where_none_is_given() -> None:
    image = photo().convert("RGBA")
    image.putalpha(hole().getchannel("A"))
    (start,) = starts(file_of(image))
    assert start.mask is not None
    assert np.array_equal(start.mask > 0, np.asarray(hole().getchannel("A")) == 0)
    assert start.image[20, 20].tolist() == [255, 255, 255]
    assert start.image[0, 63].tolist() == ramp(64, 48)[0, 63].tolist()


@pytest.mark.parametrize("alpha", [128, 255])
def test_an_alpha_that_hides_nothing_makes_no_mask(alpha: int) -> None:
    image = photo().convert("RGBA")
    image.putalpha(alpha)
    (start,) = starts(file_of(image))
    assert start.mask is None


def test_a_given_mask_goes_before_the_image_s_own_transparency() -> None:
    image = hole(box=(0, 0, 8, 8))
    (start,) = starts(file_of(image), mask=file_of(hole(box=(40, 40, 48, 48))))
    assert start.mask is not None
    assert (start.mask[4, 4], start.mask[44, 44]) == (0, 255)


def test_the_mask_is_the_first_image_s_alone() -> None:
    first, second = starts(file_of(photo()), file_of(photo(32, 32)), mask=file_of(hole()))
    assert first.mask is not None
    assert second.mask is None


def test_a_mask_for_a_photograph_on_its_side_has_the_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (start,) = starts(file_of(photo(64, 48), exif=exif), mask=file_of(hole(48, 64)))
    assert start.image.shape == (64, 48, 3)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (hole(48, 64), "48x64 instead of 64x48"),
        (hole(box=(0, 0, 0, 0)), "no transparent pixels"),
        (Image.new("RGB", (64, 48), "white"), "no transparent pixels"),
        (Image.new("L", (64, 48), 255), "no transparent pixels"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Image.Image, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        starts(file_of(photo()), mask=file_of(mask))
    assert raised.value.param == "mask"


def test_a_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="It must be PNG") as raised:
        starts(file_of(photo()), mask=file_of(hole(), "WEBP"))
    assert raised.value.param == "mask"


def test_input_images_that_are_not_used_are_checked_all_the_same() -> None:
    assert len(starts(file_of(photo()), file_of(photo()), needed=1)) == 1
    with pytest.raises(InvalidRequestError):
        starts(file_of(photo()), b"rubbish", needed=1)
