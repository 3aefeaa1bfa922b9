"""The sampler's own checks of what it is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hypergen_sampler.request import MAX_SEED, Architecture, InvalidInputError, Limits, check_request
from support import architectures
from support.architectures import PARAMETERS as ARCHITECTURE

PARAMETERS = {
    "default_width": "64",
    "default_height": "32",
    "size_factor": "8",
    "min_size": "16",
    "max_size": "128",
    "sizes": "",
    "loras": "[]",
    "lora_rank": "0",
    "default_num_inference_steps": "20",
    "max_num_inference_steps": "150",
    "default_guidance_scale": "3.5",
    "min_guidance_scale": "1",
    "max_guidance_scale": "20",
    "default_image_guidance_scale": "0",
    "max_image_guidance_scale": "0",
    "max_cache_interval": "1",
    "prompt_weightings": "none,a1111",
    "default_clip_skip": "1",
    "max_clip_skip": "12",
    "default_skip_layer_guidance_scale": "2.5",
    "max_skip_layer_guidance_scale": "10",
    "max_num_images": "10",
    "max_active_images": "32",
    "max_waiting_images": "256",
    "max_batch_size": "16",
    "latent_channels": "4",
    "vae_scale_factor": "8",
    "max_references": "0",
    "masked_image_yields": "0",
    "max_reference_pixels": "6144",
    "max_reference_side": "128",
    "schedulers": "ddim,euler",
    **ARCHITECTURE,
    "denoiser_inputs": "encoder_hidden_states,text_embeds,size_embeds",
    "size_width": "256",
    "zeros_for_no_negative_prompt": "1",
}


def model_config(**changes: str | None) -> str:
    return architectures.model_config({**PARAMETERS, **changes})


LIMITS = Limits.from_model_config(model_config())


def test_limits_are_read_with_their_types() -> None:
    assert LIMITS.default_width == 64
    assert LIMITS.default_guidance_scale == 3.5
    assert LIMITS.schedulers == ("ddim", "euler")


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="max_batch_size"):
        Limits.from_model_config(model_config(max_batch_size=None))
    with pytest.raises(ValueError, match="denoiser_inputs"):
        Architecture.from_model_config(model_config(denoiser_inputs=None))


def test_a_prompt_alone_gets_the_checkpoints_defaults() -> None:
    request = check_request({"prompt": "a rocket"}, LIMITS)
    assert (request.width, request.height) == (64, 32)
    assert (request.num_inference_steps, request.guidance_scale) == (20, 3.5)
    assert (request.num_images, request.scheduler, request.negative_prompt) == (1, "", None)


def test_where_sizes_are_built_in_no_other_is_served() -> None:
    limits = Limits.from_model_config(model_config(sizes="64x32,128x128"))
    assert check_request({"prompt": "a rocket", "width": 128, "height": 128}, limits).width == 128
    with pytest.raises(InvalidInputError, match="width: with height must be one of 64x32, 128x128, not 128x32"):
        check_request({"prompt": "a rocket", "width": 128}, limits)


def test_an_absent_seed_differs_from_request_to_request() -> None:
    seeds = {check_request({"prompt": "a rocket"}, LIMITS).seed for _ in range(8)}
    assert len(seeds) == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_images", 0),
        ("num_images", 11),
        ("width", 0),
        ("width", 8),
        ("width", 20),
        ("width", 136),
        ("height", -8),
        ("num_inference_steps", 0),
        ("num_inference_steps", 151),
        ("guidance_scale", 0.5),
        ("guidance_scale", 20.5),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_start", -0.1),
        ("guidance_start", 1.1),
        ("guidance_end", 1.1),
        ("guidance_end", float("nan")),
        ("timestep_spacing", "even"),
        ("sigmas", "linear"),
        ("eta", 1.1),
        ("eta", float("nan")),
        ("guidance_rescale", -0.1),
        ("skip_layer_guidance_scale", 10.5),
        ("skip_layer_guidance_start", -0.1),
        ("skip_layer_guidance_stop", 0.005),
        ("prompt_weighting", "compel"),
        ("prompt_weighting", ""),
        ("clip_skip", -1),
        ("clip_skip", 13),
        ("cache_interval", 0),
        ("cache_interval", 2),
        ("scheduler", "no-such-scheduler"),
        ("seed", -1),
        ("partial_images", -1),
        ("partial_images", 4),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{name}: must be .*, not "):
        check_request({"prompt": "a rocket", name: value}, LIMITS)


def test_skip_layer_guidance_is_by_default_the_models_in_guided_images() -> None:
    guided = check_request({"prompt": "x"}, LIMITS)
    assert (guided.skip_layer_guidance_scale, guided.skip_layer_guidance_start) == (2.5, 0.01)
    assert check_request({"prompt": "x", "guidance_scale": 1.0}, LIMITS).skip_layer_guidance_scale == 0.0


@pytest.mark.parametrize("name", ["scale", "start", "stop"])
def test_skip_layer_guidance_is_refused_where_the_model_has_none(name: str) -> None:
    limits = replace(LIMITS, default_skip_layer_guidance_scale=0.0, max_skip_layer_guidance_scale=0.0)
    request = check_request({"prompt": "x", f"skip_layer_guidance_{name}": 0.0}, limits)
    assert request.skip_layer_guidance_scale == 0.0
    with pytest.raises(InvalidInputError, match=rf"^skip_layer_guidance_{name}: must be absent or 0, as this model"):
        check_request({"prompt": "x", f"skip_layer_guidance_{name}": 0.1}, limits)


def test_the_last_images_seed_must_fit_too() -> None:
    assert check_request({"prompt": "x", "seed": MAX_SEED}, LIMITS).seed == MAX_SEED
    with pytest.raises(InvalidInputError, match=r"^seed: "):
        check_request({"prompt": "x", "seed": MAX_SEED, "num_images": 2}, LIMITS)


def pixels(*shape: int) -> Any:
    return np.zeros(shape, dtype=np.uint8)


def test_an_image_to_start_from_has_the_size_asked_for() -> None:
    request = check_request({"prompt": "x", "width": 32, "height": 16, "image": pixels(16, 32, 3)}, LIMITS)
    assert request.image is not None
    with pytest.raises(InvalidInputError, match=r"^image: must be \[16, 32, 3\] .*, not \[32, 16, 3\]"):
        check_request({"prompt": "x", "width": 32, "height": 16, "image": pixels(32, 16, 3)}, LIMITS)
    given = {"prompt": "x", "width": 32, "height": 16, "image": pixels(16, 32, 3), "mask": pixels(16, 24)}
    with pytest.raises(InvalidInputError, match=r"^mask: must be \[16, 32\] .*, not \[16, 24\]"):
        check_request(given, LIMITS)


def test_an_image_says_its_size_itself_and_keeps_to_the_limits() -> None:
    request = check_request({"prompt": "x", "image": pixels(48, 24, 3)}, LIMITS)
    assert (request.width, request.height) == (24, 48)
    for shape in [(48, 20, 3), (8, 64, 3), (64, 136, 3)]:
        with pytest.raises(InvalidInputError, match=r"^(width|height): "):
            check_request({"prompt": "x", "image": pixels(*shape)}, LIMITS)


WITH_REFERENCES = Limits.from_model_config(model_config(max_references="2"))


def test_references_are_cut_out_of_their_bytes_in_order() -> None:
    images = [np.random.default_rng(seed).integers(0, 256, (16, 8 * seed, 3), dtype=np.uint8) for seed in (1, 2)]
    given = {
        "prompt": "a",
        "references": np.concatenate([image.reshape(-1) for image in images]),
        "reference_sizes": np.array([image.shape[:2] for image in images], dtype=np.int32),
    }
    request = check_request(given, WITH_REFERENCES)
    assert [np.array_equal(*pair) for pair in zip(request.references, images, strict=True)] == [True, True]
    assert request.image is None


@pytest.mark.parametrize(
    ("sizes", "size", "masked", "problem"),
    [
        ([[16, 8]], 16 * 8 * 3 - 1, False, "references: must have 384 bytes as their sizes say, not 383"),
        ([[16, 8]] * 3, 3 * 16 * 8 * 3, False, "references: must be of 1 to 2 images, not 3"),
        ([[16, 8]] * 2, 2 * 16 * 8 * 3, True, "references: must be of 1 to 1 images, not 2"),
        ([], 0, False, "references: must be of 1 to 2 images, not 0"),
        ([[16, 12]], 16 * 12 * 3, False, "reference_sizes: must be multiples of 8 up to 128, and 6144 in product"),
        ([[96, 96]], 96 * 96 * 3, False, "reference_sizes: must be multiples of 8 up to 128, and 6144 in product"),
        ([[136, 8]], 136 * 8 * 3, False, "reference_sizes: must be multiples of 8 up to 128, and 6144 in product"),
        ([[-16, -8]], 16 * 8 * 3, False, "reference_sizes: must be multiples of 8 up to 128, and 6144 in product"),
        ([[2**30, 8]], 8, False, "reference_sizes: must be multiples of 8 up to 128, and 6144 in product"),
    ],
)
def test_references_that_do_not_fit_are_refused(sizes: Any, size: int, masked: bool, problem: str) -> None:
    given: dict[str, Any] = {"prompt": "a", "references": np.zeros(size, dtype=np.uint8)}
    given["reference_sizes"] = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    if masked:
        given |= {"image": pixels(32, 64, 3), "mask": pixels(32, 64)}
    with pytest.raises(InvalidInputError, match=re.escape(problem)):
        check_request(given, WITH_REFERENCES)


def test_a_masked_image_that_yields_leaves_room_for_a_reference() -> None:
    limits = replace(WITH_REFERENCES, max_references=1, masked_image_yields=1)
    given = {"references": np.zeros(384, dtype=np.uint8), "reference_sizes": np.array([[16, 8]], dtype=np.int32)}
    masked = {"image": pixels(32, 64, 3), "mask": pixels(32, 64)}
    assert len(check_request({"prompt": "a", **given, **masked}, limits).references) == 1


@pytest.mark.parametrize("name", ["references", "reference_sizes"])
def test_a_model_that_takes_no_references_refuses_them(name: str) -> None:
    given = {"references": np.zeros(384, dtype=np.uint8), "reference_sizes": np.array([[16, 8]], dtype=np.int32)}
    with pytest.raises(InvalidInputError, match="references: must be absent, as this model takes none"):
        check_request({"prompt": "a", name: given[name]}, LIMITS)


def test_the_default_strength_is_that_of_diffusers_pipelines() -> None:
    given: dict[str, Any] = {"prompt": "x", "image": pixels(32, 64, 3)}
    assert check_request(given, LIMITS).strength == 0.8
    assert check_request(given | {"mask": pixels(32, 64)}, LIMITS).strength == 1.0
    assert check_request(given | {"strength": 0.25}, LIMITS).strength == 0.25


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(InvalidInputError, match=r"^strength: must be from 0.0 to 1.0, not "):
        check_request({"prompt": "x", "image": pixels(32, 64, 3), "strength": value}, LIMITS)


@pytest.mark.parametrize(("name", "value"), [("mask", pixels(32, 64)), ("strength", 0.5)])
def test_what_belongs_to_an_image_is_refused_without_one(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name}: needs an image"):
        check_request({"prompt": "x", name: value}, LIMITS)


EDITING = Limits.from_model_config(model_config(max_image_guidance_scale="20", default_image_guidance_scale="1.5"))


def test_an_edit_by_instruction_has_a_scale_for_the_image_and_no_strength() -> None:
    given: dict[str, Any] = {"prompt": "x", "image": pixels(32, 64, 3)}
    assert check_request(given, EDITING).image_guidance_scale == 1.5
    assert check_request(given | {"image_guidance_scale": 1.0}, EDITING).image_guidance_scale == 1.0
    for name, value, words in (
        ("image_guidance_scale", 0.9, "must be from 1.0 to 20.0, not 0.9"),
        ("image_guidance_scale", float("nan"), "must be from 1.0 to 20.0"),
        ("strength", 0.5, "must be absent, as this model edits by instruction"),
    ):
        with pytest.raises(InvalidInputError, match=f"^{name}: {words}"):
            check_request(given | {name: value}, EDITING)
    with pytest.raises(InvalidInputError, match=r"^image_guidance_scale: must be absent"):
        check_request(given | {"image_guidance_scale": 1.5}, LIMITS)


def test_guidance_ends_after_it_starts_and_unasked_lasts_throughout() -> None:
    request = check_request({"prompt": "x"}, LIMITS)
    assert (request.guidance_start, request.guidance_end) == (0.0, 1.0)
    request = check_request({"prompt": "x", "guidance_start": 0.4, "guidance_end": 0.4}, LIMITS)
    assert (request.guidance_start, request.guidance_end) == (0.4, 0.4)
    with pytest.raises(InvalidInputError, match=r"^guidance_end: must be from 0.5 to 1.0, not 0.2"):
        check_request({"prompt": "x", "guidance_start": 0.5, "guidance_end": 0.2}, LIMITS)


@pytest.mark.parametrize("name", ["guidance_start", "guidance_end"])
def test_no_interval_is_taken_where_the_unet_has_the_guidance_inside(name: str) -> None:
    limits = replace(LIMITS, default_skip_layer_guidance_scale=0.0)  # which no such model has
    request = check_request({"prompt": "x", name: 0.5}, limits)
    Architecture.from_model_config(model_config()).check(request)
    distilled = Architecture.from_model_config(model_config(guidance="embedded", guidance_width="256"))
    distilled.check(check_request({"prompt": "x", "guidance_start": 0.0, "guidance_end": 1.0}, limits))
    with pytest.raises(InvalidInputError, match=f"^{name}: must be absent"):
        distilled.check(request)


@pytest.mark.parametrize(
    ("scale", "guidance", "guides"),
    [(1.0, "classifier_free", False), (1.1, "classifier_free", True), (7.5, "embedded", False), (7.5, "none", False)],
)
def test_guidance_is_skipped_at_scale_1_and_where_the_denoiser_has_it_inside(
    scale: float, guidance: str, guides: bool
) -> None:
    architecture = Architecture.from_model_config(model_config(guidance=guidance))
    assert architecture.guides(check_request({"prompt": "x", "guidance_scale": scale}, LIMITS)) is guides


INK, SOFT_INK, CLAY = (
    {"name": "ink", "scale": 0.8, "models": {"unet": "unet.ink@0.8", "text_encoder": "text_encoder.ink@0.8"}},
    {"name": "ink", "scale": 0.4, "models": {"unet": "unet.ink@0.4", "text_encoder": "text_encoder.ink@0.4"}},
    {"name": "clay", "scale": 1.0, "models": {"text_encoder_2": "text_encoder_2.clay@1"}},
)
OIL, PEN = (
    {"name": "oil", "scale": 0.5, "columns": [0, 1]},
    {"name": "pen", "scale": -1.0, "columns": [2]},
)
WITH_LORAS = Limits.from_model_config(model_config(loras=json.dumps([INK, SOFT_INK, CLAY, OIL, PEN]), lora_rank="4"))


@pytest.mark.parametrize(
    ("given", "models"),
    [
        ({}, ["unet", "text_encoder", "text_encoder_2"]),
        ({"lora": ["ink"]}, ["unet.ink@0.8", "text_encoder.ink@0.8", "text_encoder_2"]),
        ({"lora": ["ink"], "lora_scale": [0.4]}, ["unet.ink@0.4", "text_encoder.ink@0.4", "text_encoder_2"]),
        ({"lora": ["clay", "oil"]}, ["unet", "text_encoder", "text_encoder_2.clay@1"]),
        ({"lora": ["ink"], "lora_scale": [0.0]}, ["unet", "text_encoder", "text_encoder_2"]),
    ],
)
def test_a_merged_lora_takes_the_place_of_what_it_changes(given: dict[str, Any], models: list[str]) -> None:
    loras = check_request({"prompt": "x", **given}, WITH_LORAS).loras
    assert [loras.model("unet"), loras.model("text_encoder"), loras.model("text_encoder_2")] == models


@pytest.mark.parametrize(
    ("given", "scales"),
    [
        ({}, (0, 0, 0, 0)),
        ({"lora": ["oil"]}, (0.5, 0.5, 0, 0)),
        ({"lora": ["pen", "oil"], "lora_scale": [0.25, -10.0]}, (-10, -10, 0.25, 0)),
        ({"lora": ["oil", "clay", "oil"], "lora_scale": [1.0, 1.0, 0.25]}, (1.25, 1.25, 0, 0)),
        ({"lora": ["pen"], "lora_scale": [0.0]}, (0, 0, 0, 0)),
    ],
)
def test_loras_in_the_pool_have_their_scales_in_their_columns(given: dict[str, Any], scales: tuple[float, ...]) -> None:
    assert check_request({"prompt": "x", **given}, WITH_LORAS).loras.scales == scales


@pytest.mark.parametrize(
    ("given", "limits", "problem"),
    [
        ({"lora": ["oil", "ash"]}, WITH_LORAS, "lora: must be one of ink, clay, oil, pen, not 'ash'"),
        ({"lora": ["oil"]}, LIMITS, "lora: must be absent, as this model has none, not 'oil'"),
        ({"lora": ["ink"], "lora_scale": [1.0]}, WITH_LORAS, "lora_scale: must be 0, 0.4, 0.8, not 1"),
        ({"lora": ["ink"], "lora_scale": [float("nan")]}, WITH_LORAS, "lora_scale: must be 0, 0.4, 0.8, not nan"),
        (
            {"lora": ["oil"], "lora_scale": [float("nan")]},
            WITH_LORAS,
            "lora_scale: must be from -10.0 to 10.0, not nan",
        ),
        ({"lora": ["oil"], "lora_scale": [11.0]}, WITH_LORAS, "lora_scale: must be from -10.0 to 10.0, not 11.0"),
        ({"lora_scale": [1.0]}, WITH_LORAS, "lora_scale: needs a lora"),
        (
            {"lora": ["oil", "pen"], "lora_scale": [1.0]},
            WITH_LORAS,
            "lora_scale: must have a value for each LoRA, not 1 for 2",
        ),
        ({"lora": ["oil"] * 33}, WITH_LORAS, "lora: must be at most 32, not 33"),
        (
            {"lora": ["ink", "oil", "clay"]},
            WITH_LORAS,
            "lora: must not combine ink and clay: each is merged into the weights by itself",
        ),
    ],
)
def test_another_lora_or_scale_is_refused(given: dict[str, Any], limits: Limits, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{problem}$"):
        check_request({"prompt": "x", **given}, limits)


@pytest.mark.parametrize("loras", ["ink", "[7]", '[{"name": "ink"}, {"path": "x"}]'])
def test_a_parameter_of_no_use_keeps_the_model_from_starting(loras: str) -> None:
    with pytest.raises(ValueError, match=r"loras|Expecting"):
        Limits.from_model_config(model_config(loras=loras))
