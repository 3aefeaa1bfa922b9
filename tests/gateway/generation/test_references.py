"""Reference images in the sizes of a model, as diffusers' pipelines of the model prepare them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription
from hypergen_gateway.generation.references import reference_size, to_reference
from support.fake_backend import MODEL
from support.image_files import photo, ramp

FLUX2 = replace(MODEL, size_factor=16, max_references=4, max_reference_pixels=1024 * 1024)
KONTEXT = replace(FLUX2, max_references=1, preferred_reference_sizes=("672x1568", "944x1104", "1024x1024", "1104x944"))


def test_an_image_within_the_limit_is_cropped_from_its_middle_to_multiples_of_the_factor() -> None:
    reference = to_reference(photo(100, 75), "image", FLUX2)
    assert np.array_equal(reference, ramp(100, 75)[5:69, 2:98])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1040, 1024), (1024, 1008)),  # 1031.9 × 1016.0
        ((4000, 3000), (1168, 880)),  # 1182.4 × 886.8
        ((8000, 1000), (2896, 352)),  # 2896.3 × 362.0
        ((70, 20), (64, 16)),
    ],
)
def test_a_larger_image_is_scaled_to_the_limit_first(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert reference_size(size, FLUX2) == expected


def test_a_side_is_limited_too_where_engines_are_built_for_sizes() -> None:
    assert reference_size((8000, 1000), replace(FLUX2, max_reference_side=1568)) == (1568, 192)


def test_a_model_of_preferred_sizes_gets_the_one_of_the_closest_ratio() -> None:
    assert reference_size((1000, 2000), KONTEXT) == (672, 1568)
    assert reference_size((640, 480), KONTEXT) == (1104, 944)
    assert to_reference(photo(640, 480), "image", KONTEXT).shape == (944, 1104, 3)


@pytest.mark.parametrize("model", [FLUX2, KONTEXT])
@pytest.mark.parametrize(("size", "words"), [((63, 300), "63x300"), ((80, 700), "80x700")])
def test_a_small_or_long_image_is_refused_with_its_size(
    size: tuple[int, int], words: str, model: ModelDescription
) -> None:
    with pytest.raises(InvalidRequestError, match=f"An image in 'images' is {words}") as refusal:
        to_reference(Image.new("RGB", size), "images", model)
    assert refusal.value.param == "images"
