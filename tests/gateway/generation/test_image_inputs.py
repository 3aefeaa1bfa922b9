"""From uploaded images to the model's input, and back."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription, Pixels
from hypergen_gateway.generation.image_inputs import InitImage, InitImageOptions, Uploads, read_init_images
from hypergen_gateway.generation.sizes import SizePolicy
from support.fake_backend import MODEL
from support.image_files import file_of, hole, photo, ramp

REFERRING = replace(MODEL, size_factor=16, max_references=3, max_reference_pixels=256 * 256)
BUILT = replace(MODEL, sizes=("512x512", "768x512", "512x768"))


def starts(
    *images: bytes,
    mask: bytes | None = None,
    asked: Any = None,
    needed: int = 16,
    model: ModelDescription = MODEL,
    are_references: bool = False,
) -> list[InitImage]:
    uploads = Uploads(
        images=[io.BytesIO(image) for image in images],
        mask=None if mask is None else io.BytesIO(mask),
        images_param="image",
    )
    options = InitImageOptions(size=asked, count=needed, are_references=are_references)
    return read_init_images(uploads, options, model, SizePolicy())


def image_of(start: InitImage) -> Pixels:
    assert start.image is not None
    return start.image


def test_an_image_of_a_legal_size_arrives_pixel_by_pixel() -> None:
    (start,) = starts(file_of(photo(64, 48)))
    assert np.array_equal(image_of(start), ramp(64, 48))
    assert start.mask is None
    generated = np.full((48, 64, 3), 7, dtype=np.uint8)
    assert start.compositing.apply(generated) is generated


def test_another_image_is_native_in_a_legal_size_and_comes_back_in_its_own() -> None:
    (start,) = starts(file_of(photo(501, 333)))
    assert image_of(start).shape == (336, 504, 3)
    assert np.abs(image_of(start)[::48, ::72].astype(int) - ramp(504, 336)[::48, ::72]).max() < 4
    back = start.compositing.apply(image_of(start))
    assert back.shape == (333, 501, 3)
    assert np.abs(back.astype(int) - ramp(501, 333)).mean() < 1


def test_with_a_size_the_image_is_cut_to_its_proportions_from_the_middle() -> None:
    (start,) = starts(file_of(photo(96, 48)), asked=(48, 48))
    assert np.array_equal(image_of(start), ramp(96, 48)[:, 24:72])
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
    assert image_of(start)[20, 20].tolist() == [255, 255, 255]
    assert image_of(start)[0, 63].tolist() == ramp(64, 48)[0, 63].tolist()


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
    assert image_of(start).shape == (64, 48, 3)


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


def test_references_are_joined_in_order_and_the_first_says_the_size() -> None:
    files = [file_of(photo(100, 75)), file_of(photo(64, 80))]
    (start,) = starts(*files, model=REFERRING, are_references=True, needed=1)
    assert (start.image, start.mask, start.size, start.compositing.size) == (None, None, (96, 64), (100, 75))
    assert start.references is not None
    assert start.reference_sizes is not None
    assert start.reference_sizes.tolist() == [[64, 96], [80, 64]]
    parts = [ramp(100, 75)[5:69, 2:98], ramp(64, 80)]
    assert np.array_equal(start.references, np.concatenate([part.reshape(-1) for part in parts]))
    assert start.nbytes == start.references.nbytes


def test_the_size_of_the_result_may_be_another_than_that_of_the_references() -> None:
    (start,) = starts(file_of(photo(100, 75)), model=REFERRING, are_references=True, asked=(200, 100))
    assert (start.size, start.compositing.size) == ((208, 96), (200, 100))
    assert start.reference_sizes is not None
    assert start.reference_sizes.tolist() == [[64, 96]]


def test_a_masked_image_is_started_from_and_the_others_are_references() -> None:
    files = [file_of(photo(600, 400)), file_of(photo(64, 80))]
    (start,) = starts(*files, mask=file_of(hole(600, 400)), model=REFERRING)
    assert image_of(start).shape == (208, 304, 3)  # as large as a reference may be
    assert start.mask is not None
    assert start.reference_sizes is not None
    assert start.reference_sizes.tolist() == [[80, 64]]


def test_a_reference_may_take_the_place_of_a_masked_image_that_yields() -> None:
    kontext = replace(REFERRING, max_references=1, masked_image_yields=1)
    files = [file_of(photo(96, 80)), file_of(photo(64, 80))]
    (start,) = starts(*files, mask=file_of(hole(96, 80)), model=kontext)
    assert start.reference_sizes is not None
    assert start.reference_sizes.tolist() == [[80, 64]]
    with pytest.raises(InvalidRequestError, match=r"'image': 2 images\. The model takes at most 1"):
        starts(*files, model=kontext, are_references=True)


def test_with_a_strength_images_are_started_from_one_by_one() -> None:
    first, second = starts(file_of(photo(64, 48)), file_of(photo(64, 64)), model=REFERRING)
    assert [image_of(each).shape for each in (first, second)] == [(48, 64, 3), (64, 64, 3)]
    assert first.references is None


@pytest.mark.parametrize("mask", [None, file_of(hole(64, 80))])
def test_more_references_than_the_model_takes_are_refused(mask: bytes | None) -> None:
    with pytest.raises(InvalidRequestError, match=r"'image': 4 images\. The model takes at most 3") as refusal:
        starts(*[file_of(photo(64, 80))] * 4, mask=mask, model=REFERRING, are_references=True)
    assert refusal.value.param == "image"
