"""OpenAI's clients, unchanged, against the running server: models, health, keys, images."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from support.image_files import file_of, hole, photo, ramp
from support.node_client import run_node_client
from support.running_server import KEY, Server, pixels_of

AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


def test_the_model_is_listed_as_it_was_named(client: openai.OpenAI, server: Server, checkpoint: Path) -> None:
    (model,) = client.models.list().data
    assert model.id == server.model == str(checkpoint)
    assert (model.object, model.owned_by) == ("model", "hypergen")
    assert isinstance(model.created, int)
    assert abs(model.created - time.time()) < 5


def test_the_list_has_openais_shape(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers=AUTHORIZED)
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "list"
    assert set(body) == {"object", "data"}
    assert set(body["data"][0]) == {"id", "object", "created", "owned_by"}


@pytest.mark.parametrize("safe", ["/", ""], ids=["plain", "escaped"])
def test_a_model_is_retrieved_by_its_id_slashes_escaped_or_not(server: Server, safe: str) -> None:
    answer = httpx.get(f"{server.url}/v1/models/{quote(server.model, safe=safe)}", headers=AUTHORIZED)
    assert answer.json()["id"] == server.model


def test_another_id_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("no-such-model")
    assert raised.value.code == "model_not_found"


def test_a_wrong_key_is_refused(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        server.client(api_key="wrong").models.list()
    assert raised.value.code == "invalid_api_key"


def test_missing_malformed_and_wrong_keys_have_each_their_message(server: Server) -> None:
    headers: list[dict[str, str]] = [
        {},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
    ]
    answers = [httpx.get(f"{server.url}/v1/models", headers=given) for given in headers]
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}
    errors = [answer.json()["error"] for answer in answers]
    assert {(error["type"], error["code"]) for error in errors} == {("invalid_request_error", "invalid_api_key")}
    missing, malformed, wrong = errors[0]["message"], errors[1]["message"], errors[4]["message"]
    assert len({missing, malformed, wrong}) == 3
    assert [error["message"] for error in errors[1:4]] == [malformed] * 3


def test_health_needs_no_key_and_tells_the_truth(server: Server) -> None:
    assert server.health() == {"status": "healthy", "model": server.model, "queue_size": 0, "device": "cpu"}
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_an_image_has_the_size_asked_for_and_openais_fields(client: openai.OpenAI) -> None:
    response = client.images.generate(model="gpt-image-1", prompt="a red rocket", size="96x64", n=2)
    assert response.data is not None
    assert [pixels_of(image).shape for image in response.data] == [(64, 96, 3)] * 2
    assert (response.output_format, response.background) == ("png", "opaque")
    assert abs(response.created - time.time()) < 60


def test_the_same_seed_gives_the_same_bytes(client: openai.OpenAI) -> None:
    first, second, other = (
        client.images.generate(prompt="a red rocket", extra_body={"seed": seed}).data for seed in (3, 3, 4)
    )
    assert first is not None
    assert second is not None
    assert other is not None
    assert first[0].b64_json == second[0].b64_json != other[0].b64_json


def test_a_stream_ends_with_the_image_that_is_native_without_one(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": "a red rocket", "size": "64x64", "extra_body": {"seed": 3}}
    (alone,) = client.images.generate(**fields).data or []
    events = list(client.images.generate(**fields, stream=True, partial_images=3))
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    images = [pixels_of(event) for event in events]
    assert np.array_equal(images[-1], pixels_of(alone))
    distances = [np.abs(image.astype(int) - images[-1]).mean() for image in images]
    assert distances[0] > distances[1] > distances[2] > distances[3] == 0


def test_usage_and_times_are_the_samplers(server: Server) -> None:
    body = {"prompt": "a red rocket on a blue background", "n": 2, "size": "64x64"}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=AUTHORIZED, timeout=60)
    usage = answer.json()["usage"]
    assert usage["input_tokens"] == usage["input_tokens_details"]["text_tokens"] >= 7
    assert usage["output_tokens"] == 2 * 64
    phases = dict(phase.split(";dur=") for phase in answer.headers["server-timing"].split(", "))
    assert list(phases) == ["queue", "encode-text", "denoise", "decode", "encode-image"]
    assert all(float(phases[phase]) > 0 for phase in ("denoise", "decode"))
    assert sum(map(float, phases.values())) < int(answer.headers["openai-processing-ms"]) + 50


def test_a_link_gives_the_file_without_a_key(client: openai.OpenAI) -> None:
    response = client.images.generate(
        prompt="a red rocket", response_format="url", output_format="webp", extra_body={"num_inference_steps": 2}
    )
    assert response.data is not None
    file = httpx.get(response.data[0].url or "")
    assert (file.status_code, file.headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(file.content)).format == "WEBP"


def test_an_edit_generates_in_the_mask_and_leaves_everything_else_in_its_own_size(client: openai.OpenAI) -> None:
    response = client.images.edit(
        image=file_of(photo(101, 67)),
        mask=file_of(hole(101, 67, (30, 20, 70, 50))),
        prompt="a red rocket",
        n=2,
        extra_body={"seed": 3, "num_inference_steps": 4},
    )
    assert response.data is not None
    first, second = (pixels_of(image) for image in response.data)
    for image in (first, second):
        assert image.shape == (67, 101, 3)
        changed = (image != ramp(101, 67)).any(axis=2)
        assert changed[20:50, 30:70].mean() > 0.9
        changed[20:50, 30:70] = False
        assert not changed.any()
    assert not np.array_equal(first, second)


def test_the_less_strength_the_more_of_an_image_stays(client: openai.OpenAI) -> None:
    def distance(strength: float) -> float:
        fields = {"seed": 3, "num_inference_steps": 10, "strength": strength}
        response = client.images.edit(image=file_of(photo(64, 64)), prompt="a red rocket", extra_body=fields)
        assert response.data is not None
        return float(np.abs(pixels_of(response.data[0]).astype(int) - ramp(64, 64)).mean())

    assert distance(0.2) < distance(0.6) < distance(1.0)


def test_several_input_images_are_used_in_turn_in_a_stream_too(client: openai.OpenAI) -> None:
    stream = client.images.edit(
        image=[file_of(photo(64, 64)), file_of(photo(96, 64), "JPEG")],
        prompt="a red rocket",
        n=3,
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 4, "strength": 0.9},
    )
    events = list(stream)
    assert sorted(event.type for event in events) == ["image_edit.completed"] * 3 + ["image_edit.partial_image"] * 3
    shapes = {(dict(event.model_extra or {})["image_index"], pixels_of(event).shape) for event in events}
    assert shapes == {(0, (64, 64, 3)), (1, (64, 96, 3)), (2, (64, 64, 3))}


@pytest.mark.filterwarnings("ignore:deprecated")
def test_variations_are_of_the_image_and_not_it(client: openai.OpenAI) -> None:
    response = client.images.create_variation(image=file_of(photo(64, 64)), n=2, response_format="b64_json")
    assert response.data is not None
    for image in response.data:
        assert pixels_of(image).shape == (64, 64, 3)
        assert not np.array_equal(pixels_of(image), ramp(64, 64))


def test_the_request_id_comes_back(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health", headers={"x-request-id": "mine-42"})
    assert answer.headers["x-request-id"] == "mine-42"
    assert httpx.get(f"{server.url}/health").headers["x-request-id"]


async def test_openais_node_client_works_unchanged(server: Server, node: Path) -> None:
    seen = await run_node_client(node, f"{server.url}/v1", KEY, server.model)
    assert [model["id"] for model in seen["models"]] == [server.model]
    assert seen["retrieved"]["owned_by"] == "hypergen"
    assert [image["seed"] for image in seen["images"]["data"]] == [7, 8]
    assert (seen["unknownModel"]["name"], seen["unknownModel"]["code"]) == ("NotFoundError", "model_not_found")
    assert (seen["wrongSize"]["name"], seen["wrongSize"]["param"]) == ("BadRequestError", "size")
    assert (seen["wrongKey"]["name"], seen["wrongKey"]["code"]) == ("AuthenticationError", "invalid_api_key")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "size": "63x"}, "size"),
        ({"prompt": "x", "size": "0x8"}, "size"),
        ({"prompt": "x", "size": "99992x99992"}, "size"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "n": "2"}, "n"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "x", "num_inference_steps": 151}, "num_inference_steps"),
        ({"prompt": "x", "guidance_scale": 0.5}, "guidance_scale"),
        ({"prompt": "x", "guidance_scale": 21}, "guidance_scale"),
        ({"prompt": "x", "scheduler": "no-such"}, "scheduler"),
        ({"prompt": "x", "seed": -2}, "seed"),
        ({"prompt": "x", "seed": 2**70}, "seed"),
        # Only the sampler, which reads the scheduler, can know this one.
        ({"prompt": "x", "scheduler": "lcm", "num_inference_steps": 100}, "num_inference_steps"),
    ],
)
def test_a_bad_value_is_a_400_that_names_it(server: Server, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=AUTHORIZED, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}


def test_malformed_json_is_a_400(server: Server) -> None:
    headers = AUTHORIZED | {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/images/generations", content=b'{"prompt": ', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/images/generations", 405)]
)
def test_a_wrong_route_or_method_has_openais_shape_too(server: Server, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path, headers=AUTHORIZED)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
