"""From the fields of a body to a request that is legal for the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.datastructures import Headers

from hypergen_gateway.api.bodies import parse_json
from hypergen_gateway.api.client_request import to_client_request, to_generation_request
from hypergen_gateway.api.fields import ImageRequest
from hypergen_gateway.api.loras import with_prompt_loras
from hypergen_gateway.api.validation import validate
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import MAX_SEED, GenerationRequest, Lora, ModelDescription
from hypergen_gateway.generation.images import FileFormat
from hypergen_gateway.generation.request import ClientRequest
from hypergen_gateway.generation.sizes import SizePolicy
from support.fake_backend import MODEL


def generation(served: ModelDescription = MODEL, **fields: Any) -> GenerationRequest:
    (sub_request,) = client_request(served, **fields).sub_requests
    return sub_request.generation


def client_request(served: ModelDescription = MODEL, **fields: Any) -> ClientRequest:
    body = validate({"prompt": "a fox"} | fields, ImageRequest, served)
    return to_client_request(body, [], served, Headers(), "/v1/images/generations")


def test_what_is_absent_comes_from_the_model() -> None:
    made = generation()
    assert made == GenerationRequest(
        prompt="a fox",
        num_images=1,
        width=64,
        height=48,
        num_inference_steps=20,
        guidance_scale=5.0,
        scheduler=None,
        seed=made.seed,
    )


def test_what_is_given_arrives() -> None:
    made = generation(
        replace(
            MODEL,
            max_cache_interval=10,
            prompt_weightings=("none", "a1111"),
            max_clip_skip=12,
            max_skip_layer_guidance_scale=10.0,
        ),
        negative_prompt="blurry",
        n=2,
        size="96x40",
        num_inference_steps=7,
        guidance_scale=3,
        guidance_start=0,
        guidance_end=0.6,
        cache_interval=3,
        scheduler="euler",
        timestep_spacing="trailing",
        sigmas="karras",
        eta=0.5,
        guidance_rescale=0.7,
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.3,
        prompt_weighting="a1111",
        clip_skip=2,
        seed=9,
    )
    assert made == GenerationRequest(
        prompt="a fox",
        negative_prompt="blurry",
        num_images=2,
        width=96,
        height=40,
        num_inference_steps=7,
        guidance_scale=3.0,
        guidance_start=0.0,
        guidance_end=0.6,
        cache_interval=3,
        scheduler="euler",
        timestep_spacing="trailing",
        sigmas="karras",
        eta=0.5,
        guidance_rescale=0.7,
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.3,
        prompt_weighting="a1111",
        clip_skip=2,
        seed=9,
    )


@pytest.mark.parametrize(
    ("given", "blamed"),
    [
        ({"start": 0.3}, "start"),
        ({"stop": 0.0}, "stop"),
        ({"start": 0.3, "stop": 0.25}, "stop"),
        ({"start": 0.2}, None),
        ({"start": 0.0, "stop": 0.0}, None),
    ],
)
def test_an_interval_of_skip_layer_guidance_is_judged_with_its_defaults(
    given: dict[str, float], blamed: str | None
) -> None:
    served = replace(MODEL, max_skip_layer_guidance_scale=10.0)
    fields = {f"skip_layer_guidance_{name}": value for name, value in given.items()}
    if blamed is None:
        generation(served, **fields)
        return
    with pytest.raises(
        InvalidRequestError, match=rf"'skip_layer_guidance_{blamed}': {given[blamed]}. It must"
    ) as caught:
        generation(served, **fields)
    assert caught.value.param == f"skip_layer_guidance_{blamed}"


def test_the_nearest_size_is_native_and_where_sizes_are_built_in_one_of_those() -> None:
    served = replace(MODEL, sizes=("64x48", "128x128"))
    for size, generated in (
        ("128x128", (128, 128)),
        ("auto", (64, 48)),
        ("1024x768", (64, 48)),
        ("500x500", (128, 128)),
    ):
        made = generation(served, size=size)
        assert (made.width, made.height) == generated


def test_strictly_the_sizes_that_are_built_in_are_named() -> None:
    served = replace(MODEL, sizes=("64x48", "128x128"))
    with pytest.raises(InvalidRequestError, match=r"It must be 'auto' or one of 64x48, 128x128\."):
        SizePolicy(name="strict").check((128, 48), served)
    with pytest.raises(InvalidRequestError, match=r"It must be 'auto' or one of 64x48, 128x128\."):
        validate({"prompt": "a", "size": "64"}, ImageRequest, served, SizePolicy(name="strict"))


def test_null_is_the_same_as_absent() -> None:
    fields = ("n", "size", "quality", "style", "user", "seed", "scheduler", "lora_path", "stream", "output_format")
    nothing: dict[str, Any] = dict.fromkeys(fields)
    assert replace(generation(**nothing), seed=0) == replace(generation(), seed=0)


def test_fields_nobody_knows_and_the_model_are_ignored() -> None:
    assert generation(seed=1, model="gpt-image-1", input_fidelity={"any": ["thing"]}) == generation(seed=1)


@pytest.mark.parametrize(
    ("quality", "steps"), [("low", 10), ("high", 30), ("hd", 30), ("medium", 20), ("auto", 20), ("standard", 20)]
)
def test_quality_chooses_steps(quality: str, steps: int) -> None:
    assert generation(quality=quality).num_inference_steps == steps


def test_quality_stays_within_the_limits_and_yields_to_steps_that_are_given() -> None:
    assert generation(replace(MODEL, default_num_inference_steps=1), quality="low").num_inference_steps == 1
    assert generation(replace(MODEL, default_num_inference_steps=149), quality="high").num_inference_steps == 150
    assert generation(quality="low", num_inference_steps=11).num_inference_steps == 11


def test_random_seeds_differ_and_survive_javascript() -> None:
    seeds = {generation(n=10).seed for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) + 9 < 2**53


def test_the_largest_seed_is_legal_as_long_as_the_last_image_s_seed_is() -> None:
    assert generation(seed=MAX_SEED).seed == MAX_SEED
    assert generation(seed=MAX_SEED - 9, n=10).seed == MAX_SEED - 9


def test_the_longest_prompt_and_any_unicode_pass() -> None:
    assert len(generation(prompt="🦊" * 32_000).prompt) == 32_000
    assert parse_json(b'{"prompt": "\\ud83e\\udd8a\\u0000"}')["prompt"] == "🦊\0"


@pytest.mark.parametrize(
    ("asked", "told"), [("auto", "medium"), ("hd", "high"), ("low", "low"), ("standard", "medium")]
)
def test_quality_is_told_in_a_word_of_openai_s_schema(asked: str, told: str) -> None:
    assert client_request(quality=asked).quality == told


def test_previews_are_for_streams() -> None:
    assert generation(stream=True, partial_images=2).partial_images == 2
    assert generation(partial_images=2).partial_images == 0


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({}, FileFormat("png", 100)),
        ({"output_format": "jpeg"}, FileFormat("jpeg", 100)),
        ({"output_format": "webp", "output_compression": 0}, FileFormat("webp", 0)),
        ({"output_format": "png", "output_compression": 100}, FileFormat("png", 100)),
    ],
)
def test_format_and_compression_say_which_file_is_made(fields: dict[str, Any], made: FileFormat) -> None:
    assert client_request(**fields).file_format == made


WITH_LORAS = replace(
    MODEL,
    loras=(
        Lora(name="ink", scale=0.8, is_merged=True),
        Lora(name="ink", scale=0.4, is_merged=True),
        Lora(name="clay", scale=1.0, is_merged=True),
        Lora(name="oil", scale=0.5),
        Lora(name="pen", scale=1.0),
    ),
)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"lora_path": "ink"}, {"ink": 0.8}),
        ({"lora_path": "ink", "lora_scale": None}, {"ink": 0.8}),
        ({"lora_path": "ink", "lora_scale": 0.4}, {"ink": 0.4}),
        ({"lora_path": "clay", "lora_scale": 1}, {"clay": 1.0}),
        ({"lora_path": "ink", "lora_scale": 0}, {}),
        ({"lora_scale": 0.7}, {}),
        ({"lora_path": "oil", "lora_scale": -1.25}, {"oil": -1.25}),
        ({"loras": []}, {}),
        ({"loras": [{"name": "oil"}, {"name": "pen", "scale": -0.3}]}, {"oil": 0.5, "pen": -0.3}),
        ({"loras": [{"name": "oil", "scale": 0}, {"name": "pen", "scale": 10}]}, {"pen": 10.0}),
        ({"lora_path": "pen", "loras": [{"name": "ink"}]}, {"pen": 1.0, "ink": 0.8}),
    ],
)
def test_loras_are_asked_for_by_name_at_their_scales(fields: dict[str, Any], expected: dict[str, float]) -> None:
    made = generation(WITH_LORAS, **fields)
    assert dict(zip(made.lora, made.lora_scale, strict=True)) == expected


@pytest.mark.parametrize(
    ("prompt", "rest", "expected"),
    [
        ("a fox <lora:oil:0.8> at dusk", "a fox  at dusk", {"oil": 0.8}),
        ("<lora:oil>a fox<lora:pen:-.5>", "a fox", {"oil": 0.5, "pen": -0.5}),
        ("a fox <lora:oil:0>", "a fox", {}),
        ("a <fox> lora:oil:1", "a <fox> lora:oil:1", {}),
    ],
)
def test_a_prompt_may_name_loras(prompt: str, rest: str, expected: dict[str, float]) -> None:
    body = with_prompt_loras(validate({"prompt": prompt}, ImageRequest, WITH_LORAS))
    made = to_generation_request(body, WITH_LORAS, 0)
    assert made.prompt == rest
    assert dict(zip(made.lora, made.lora_scale, strict=True)) == expected


@pytest.mark.parametrize("tag", ["<lora:oil:>", "<lora:oil:nan>", "<lora:oil:11>", "<lora:oil:1e1>", "<lora:oil>" * 33])
def test_a_tag_of_no_use_is_refused(tag: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        with_prompt_loras(validate({"prompt": f"a fox {tag}"}, ImageRequest, WITH_LORAS))
    assert refused.value.param == "prompt"


KNOWN = "'ink', 'clay', 'oil', 'pen'"
LEGAL = (
    'It must be a list of at most 32 objects such as {"name": "ink", "scale": 0.8}, '
    f"with scales from -10 to 10 and names of {KNOWN}."
)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"lora_path": "ash"}, "lora_path", f'"ash". It must be one of {KNOWN}.'),
        ({"lora_path": ""}, "lora_path", f"It must be one of {KNOWN}."),
        ({"lora_path": "/srv/ink.safetensors", "lora_scale": 0}, "lora_path", f"It must be one of {KNOWN}."),
        ({"lora_path": "ink", "lora_scale": 1}, "lora_scale", "1. 'ink' is served at 0.8, 0.4; 0 disables it."),
        ({"loras": [{"name": "oil"}, {"name": "ash", "scale": 0}]}, "loras", f'"ash". {LEGAL}'),
        ({"loras": [{"name": "ink", "scale": 0.5}]}, "loras", "0.5. 'ink' is served at 0.8, 0.4; 0 disables it."),
        (
            {"lora_path": "clay", "loras": [{"name": "ink"}]},
            "loras",
            "'ink' cannot be combined with 'clay', as each of them is merged into a copy of the model.",
        ),
        ({"loras": [{"name": "oil", "scale": 11}]}, "loras", LEGAL),
        ({"loras": [{"name": "oil", "weight": 1}]}, "loras", LEGAL),
        ({"loras": [{"scale": 1}]}, "loras", LEGAL),
        ({"loras": ["oil"]}, "loras", LEGAL),
        ({"loras": "oil"}, "loras", LEGAL),
        ({"loras": [{"name": "oil"}] * 33}, "loras", LEGAL),
        (
            {"lora_path": "pen", "loras": [{"name": "oil"}] * 32},
            "loras",
            "with 'lora_path', the request has 33 LoRAs, and at most 32 are possible.",
        ),
    ],
)
def test_another_lora_or_scale_is_refused_with_those_that_are_there(
    fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        generation(WITH_LORAS, **fields)
    assert refused.value.param == param
    assert refused.value.message.endswith(message)
