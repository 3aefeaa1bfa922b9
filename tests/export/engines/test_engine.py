from __future__ import annotations

import pytest

from hypergen_export.engines.engine import (
    MAX_SIZES,
    OPENVINO,
    TENSORRT,
    check_dtype,
    choose_sizes,
    read_sizes,
    size_parameters,
)
from hypergen_export.errors import BadOptionError

LIMITS = {"size_factor": "8", "min_size": "64", "max_size": "1024", "default_width": "512", "default_height": "448"}


def test_sizes_are_read_in_order_and_once() -> None:
    assert read_sizes("768x512, 512x512,768x512") == ((768, 512), (512, 512))


@pytest.mark.parametrize(
    "text", ["", ",", "512", "512x", "x512", "512×512", "-8x8", "5.5x8", "512x512;64x64", "٥١٢x٥١٢"]
)
def test_text_that_is_not_a_list_of_sizes_is_rejected(text: str) -> None:
    with pytest.raises(BadOptionError, match=r"^--sizes: must be a list of WIDTHxHEIGHT"):
        read_sizes(text)


def test_more_sizes_than_a_gpu_has_room_for_are_refused() -> None:
    with pytest.raises(BadOptionError, match="17 sizes; at most 16"):
        read_sizes(",".join(f"{8 * side}x64" for side in range(8, 8 + MAX_SIZES + 1)))


@pytest.mark.parametrize("size", [(65, 64), (64, 100), (56, 64), (64, 1032), (0, 0)])
def test_a_size_that_the_model_cannot_generate_is_rejected(size: tuple[int, int]) -> None:
    with pytest.raises(BadOptionError, match=r"this model; width and height must be multiples of 8 from 64 to 1024"):
        choose_sizes(TENSORRT, [(512, 512), size], LIMITS)


def test_without_sizes_the_models_own_is_built_in() -> None:
    assert choose_sizes(TENSORRT, (), LIMITS) == ((512, 448),)


def test_an_engine_that_takes_any_size_gets_none() -> None:
    assert choose_sizes(OPENVINO, (), LIMITS) == ()
    with pytest.raises(BadOptionError, match="openvino takes any size"):
        choose_sizes(OPENVINO, ((512, 512),), LIMITS)


def test_an_engine_rejects_other_dtypes_than_its_own() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        check_dtype(TENSORRT, dtype)
    with pytest.raises(
        BadOptionError, match=r"--dtype float16: openvino supports float32, bfloat16, int8, int8-weights, int4"
    ):
        check_dtype(OPENVINO, "float16")


def test_the_default_size_is_the_models_own_where_that_is_built_in_else_the_first() -> None:
    first = size_parameters([(768, 512), (512, 512)], LIMITS)
    assert (first["default_width"], first["default_height"]) == ("768", "512")
    own = size_parameters([(768, 512), (512, 448)], LIMITS)
    assert (own["default_width"], own["default_height"]) == ("512", "448")


def test_clients_learn_the_sizes_that_are_built_in() -> None:
    parameters = size_parameters([(768, 512), (512, 640)], LIMITS)
    assert parameters["sizes"] == "768x512,512x640"
    assert (parameters["min_size"], parameters["max_size"]) == ("512", "768")
    assert size_parameters((), LIMITS) == {}
