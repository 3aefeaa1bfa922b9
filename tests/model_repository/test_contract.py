"""The sampler's own checks of what it is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from contract import MAX_SEED, Architecture, InvalidInputError, Limits, check_request

PARAMETERS = {
    "default_width": "64",
    "default_height": "32",
    "size_factor": "8",
    "min_size": "16",
    "max_size": "128",
    "sizes": "",
    "default_num_inference_steps": "20",
    "max_num_inference_steps": "150",
    "default_guidance_scale": "3.5",
    "max_guidance_scale": "20",
    "max_num_images": "10",
    "max_active_images": "32",
    "max_waiting_images": "256",
    "max_batch_size": "16",
    "latent_channels": "4",
    "vae_scale_factor": "8",
    "schedulers": "ddim,euler",
    "text_encoders": "text_encoder,text_encoder_2",
    "tokenizers": "tokenizer,tokenizer_2",
    "unet_conditions": "encoder_hidden_states,text_embeds,time_ids",
    "guidance_width": "0",
    "zeros_for_no_negative_prompt": "1",
}


def model_config(**changes: str | None) -> str:
    values = {key: value for key, value in (PARAMETERS | changes).items() if value is not None}
    return json.dumps({"parameters": {key: {"string_value": value} for key, value in values.items()}})


LIMITS = Limits.from_model_config(model_config())


def test_limits_are_read_with_their_types() -> None:
    assert LIMITS.default_width == 64
    assert LIMITS.default_guidance_scale == 3.5
    assert LIMITS.schedulers == ("ddim", "euler")


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="max_batch_size"):
        Limits.from_model_config(model_config(max_batch_size=None))
    with pytest.raises(ValueError, match="unet_conditions"):
        Architecture.from_model_config(model_config(unet_conditions=None))


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
        ("scheduler", "no-such-scheduler"),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{name}: must be .*, not "):
        check_request({"prompt": "a rocket", name: value}, LIMITS)


def test_the_last_images_seed_must_fit_too() -> None:
    assert check_request({"prompt": "x", "seed": MAX_SEED}, LIMITS).seed == MAX_SEED
    with pytest.raises(InvalidInputError, match=r"^seed: "):
        check_request({"prompt": "x", "seed": MAX_SEED, "num_images": 2}, LIMITS)


@pytest.mark.parametrize(("scale", "width", "guides"), [(1.0, "0", False), (1.1, "0", True), (7.5, "256", False)])
def test_guidance_is_skipped_at_scale_1_and_where_the_unet_has_it_inside(
    scale: float, width: str, guides: bool
) -> None:
    architecture = Architecture.from_model_config(model_config(guidance_width=width))
    assert architecture.guides(check_request({"prompt": "x", "guidance_scale": scale}, LIMITS)) is guides
