"""From images to OpenAI's objects."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
from starlette.datastructures import Headers

from hypergen_gateway.api.client_request import to_client_request
from hypergen_gateway.api.fields import ImageRequest
from hypergen_gateway.api.responses import CompletedEvent, image_event, images_response, server_timing, usage
from hypergen_gateway.api.validation import validate
from hypergen_gateway.generation.backend import Timings
from hypergen_gateway.generation.request import ClientRequest
from hypergen_gateway.generation.service import EncodedImage, RawImage, encode_image
from support.fake_backend import MODEL, flat_image, flat_preview


def client_request(**fields: Any) -> ClientRequest:
    body = validate({"prompt": "a red fox", "size": "64x48", "seed": 5} | fields, ImageRequest, MODEL)
    return to_client_request(body, [], MODEL, Headers(), "/v1/images/generations")


def generated(**fields: Any) -> tuple[ClientRequest, list[EncodedImage]]:
    request = client_request(**fields)
    (sub_request,) = request.sub_requests
    images = [flat_image(sub_request.generation, index) for index in range(request.num_images)]
    return request, [
        encode_image(RawImage(sub_request=sub_request, image=image), request.file_format) for image in images
    ]


def test_a_response_holds_the_files_in_order_each_with_its_seed() -> None:
    request, images = generated(n=3)
    data = images_response(request, images).data
    assert [image.seed for image in data] == [5, 6, 7]
    assert [base64.b64decode(image.b64_json or "") for image in data] == [image.file for image in images]
    assert {image.revised_prompt for image in data} == {"a red fox"}


def test_links_take_the_place_of_base64() -> None:
    request, images = generated(n=2)
    data = images_response(request, images, ["http://a", "http://b"]).data
    assert [(image.url, image.b64_json) for image in data] == [("http://a", None), ("http://b", None)]


@pytest.mark.parametrize(("size", "told"), [("1024x1536", "1024x1536"), ("96x64", "96x64"), ("auto", "64x48")])
def test_size_is_that_of_the_image_in_answers_and_events(size: str, told: str) -> None:
    request, images = generated(size=size)
    assert images_response(request, images).size == told
    assert image_event(request, images[0], 0).size == told


def test_usage_counts_the_prompt_once_and_the_squares_of_every_image() -> None:
    _, images = generated(n=3, size="64x48")
    cost = usage(images)
    assert (cost.input_tokens, cost.output_tokens, cost.total_tokens) == (3, 3 * 8 * 6, 3 + 144)
    assert (cost.input_tokens_details.text_tokens, cost.input_tokens_details.image_tokens) == (3, 0)


def test_a_completed_event_has_the_usage_of_its_own_image() -> None:
    request, images = generated(n=2)
    event = image_event(request, images[1], 0)
    assert isinstance(event, CompletedEvent)
    assert (event.image_index, event.seed, event.usage.output_tokens) == (1, 6, 48)


def test_a_preview_s_event_has_its_number_and_no_usage() -> None:
    request = client_request(stream=True, partial_images=3, n=2)
    (sub_request,) = request.sub_requests
    raw = RawImage(sub_request=sub_request, image=flat_preview(sub_request.generation, 1, 2))
    event = image_event(request, encode_image(raw, request.file_format), 2).model_dump()
    assert (event["type"], event["partial_image_index"], event["image_index"]) == (
        "image_generation.partial_image",
        2,
        1,
    )
    assert "usage" not in event


def test_server_timing_names_every_phase_with_what_the_slowest_image_took() -> None:
    _, images = generated(n=2)
    slow = replace(images[1].image, timings=Timings(queue=9.0, encode_text=1.0, denoise=40.26, decode=4.0))
    images = [replace(images[0], encode_ms=2.0), replace(images[1], image=slow, encode_ms=3.0)]
    assert server_timing(images) == (
        "queue;dur=9.0, encode-text;dur=2.0, denoise;dur=40.3, decode;dur=4.0, encode-image;dur=3.0"
    )
