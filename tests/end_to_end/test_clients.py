"""OpenAI's clients, unchanged, against the running server: models, health, keys, pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from node_client import install_node_client, run_node_client
from running_server import KEY, Server, pixels_of

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


def test_a_picture_has_the_size_asked_for_and_openais_fields(client: openai.OpenAI) -> None:
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


def test_the_request_id_comes_back(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health", headers={"x-request-id": "mine-42"})
    assert answer.headers["x-request-id"] == "mine-42"
    assert httpx.get(f"{server.url}/health").headers["x-request-id"]


async def test_openais_node_client_works_unchanged(server: Server) -> None:
    seen = await run_node_client(install_node_client(), f"{server.url}/v1", KEY, server.model)
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
        ({"prompt": "x", "size": "63x64"}, "size"),
        ({"prompt": "x", "size": "8x8"}, "size"),
        ({"prompt": "x", "size": "99992x99992"}, "size"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "n": "2"}, "n"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "x", "num_inference_steps": 151}, "num_inference_steps"),
        ({"prompt": "x", "guidance_scale": 0.5}, "guidance_scale"),
        ({"prompt": "x", "guidance_scale": 21}, "guidance_scale"),
        ({"prompt": "x", "scheduler": "no-such"}, "scheduler"),
        ({"prompt": "x", "seed": -1}, "seed"),
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
