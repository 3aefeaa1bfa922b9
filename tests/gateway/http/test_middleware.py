"""What every request and every response goes through."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory

KEY = "sk-correct-horse"
IMAGE = {"prompt": "a fox"}


@pytest.fixture
async def locked(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(Config(api_key=KEY), backend)) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/acme/tiny-emoji", "/nowhere"])
async def test_the_key_opens_and_its_absence_closes(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path, headers={"Authorization": f"Bearer {KEY}"})).status_code in (200, 404)
    response = await locked.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_a_missing_a_malformed_and_a_wrong_key_each_have_their_own_message(locked: httpx.AsyncClient) -> None:
    malformed = [KEY, f"Token {KEY}", f"Bearer{KEY}", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer\t{KEY}", ""]
    wrong = [f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"bearer x{KEY}", f"Bearer {KEY.upper()}", f"Bearer {KEY} {KEY}"]
    messages = {}
    for kind, values in (("malformed", malformed), ("wrong", wrong)):
        responses = [await locked.get("/v1/models", headers={"Authorization": value}) for value in values]
        assert {response.status_code for response in responses} == {401}
        messages[kind] = {response.json()["error"]["message"] for response in responses}
    messages["missing"] = {(await locked.get("/v1/models")).json()["error"]["message"]}
    assert [len(said) for said in messages.values()] == [1, 1, 1]
    assert len(set.union(*messages.values())) == 3


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer  ", "bEaReR    "])
async def test_the_scheme_is_read_as_rfc_9110_has_it(locked: httpx.AsyncClient, scheme: str) -> None:
    assert (await locked.get("/v1/models", headers={"Authorization": f"{scheme}{KEY}"})).status_code == 200


async def test_azure_s_clients_send_the_key_in_a_header_of_its_own(locked: httpx.AsyncClient) -> None:
    for headers, status, words in (
        ([("api-key", KEY)], 200, ""),
        ([("API-Key", KEY)], 200, ""),
        ([("api-key", KEY + "x")], 401, "Incorrect"),
        ([("api-key", "")], 401, "malformed"),
        ([("api-key", KEY), ("api-key", KEY)], 401, "malformed"),
        # Who says who he is in the other header means it.
        ([("Authorization", "Bearer wrong"), ("api-key", KEY)], 401, "Incorrect"),
        ([("Authorization", f"Bearer {KEY}"), ("api-key", "wrong")], 200, ""),
    ):
        response = await locked.get("/v1/models", headers=headers)
        assert response.status_code == status
        assert words in response.text


async def test_two_authorization_headers_and_one_outside_ascii_are_refused(locked: httpx.AsyncClient) -> None:
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")]
    assert (await locked.get("/v1/models", headers=twice)).status_code == 401
    assert (await locked.get("/v1/models", headers={b"Authorization": b"Bearer \xff\xfe"})).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
async def test_health_needs_no_key(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


async def test_an_unauthorised_body_is_not_read(locked: httpx.AsyncClient, backend: FakeBackend) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    assert (await locked.post("/v1/images/generations", content=never())).status_code == 401
    assert backend.generations == []


async def test_without_a_configured_key_any_authorization_is_ignored(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models", headers={"Authorization": "nonsense"})).status_code == 200


async def test_every_response_carries_the_request_s_id_and_the_time_taken(client: httpx.AsyncClient) -> None:
    for path, status in (("/v1/models", 200), ("/nowhere", 404), ("/health", 200)):
        response = await client.get(path, headers={"x-request-id": "mine-1"})
        assert response.status_code == status
        assert response.headers["x-request-id"] == "mine-1"
        assert int(response.headers["openai-processing-ms"]) >= 0
    assert (await client.get("/health", headers={"x-request-id": "two words"})).headers["x-request-id"] != "two words"


async def test_the_access_log_has_method_path_status_and_id_and_no_forged_lines(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hypergen_gateway.access")
    await client.get("/nowhere%0aforged", headers={"x-request-id": "mine-1"})
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("GET /nowhere%0Aforged 404 ")
    assert line.endswith(" mine-1")


async def test_an_unforeseen_exception_is_a_500_whose_details_are_only_in_the_log(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = RuntimeError("/srv/secret/model.onnx is broken")
    headers = {"x-request-id": "mine-1"}
    response = await client.post("/v1/images/generations", json=IMAGE, headers=headers)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"] == "mine-1"
    assert "/srv/secret/model.onnx is broken" in caplog.text
    assert "mine-1" in caplog.text


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EMFILE, 503), (errno.ENFILE, 503), (errno.ENOSPC, 507), (errno.EACCES, 500)]
)
async def test_a_server_without_free_files_or_room_says_so(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture, number: int, status: int
) -> None:
    backend.failure = OSError(number, os.strerror(number), "/srv/secret")
    response = await client.post("/v1/images/generations", json=IMAGE)
    assert response.status_code == status
    assert ("retry-after" in response.headers) == (status == 503)
    assert "secret" not in response.text
    assert os.strerror(number) in caplog.text


async def test_no_log_holds_the_key_or_the_prompt(
    locked: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hypergen_gateway")
    backend.failure = RuntimeError("boom")
    await locked.post("/v1/images/generations", json=IMAGE, headers={"Authorization": f"Bearer {KEY}"})
    await locked.get("/v1/models", headers={"Authorization": "Bearer sk-wrong"})
    assert caplog.records
    for secret in (KEY, "sk-wrong", "a fox"):
        assert secret not in caplog.text


async def test_head_answers_as_get_does_and_options_names_the_methods(client: httpx.AsyncClient) -> None:
    assert (await client.head("/v1/models")).status_code == 200
    assert (await client.head("/health")).status_code == 200
    response = await client.options("/v1/images/generations")
    assert response.status_code == 204
    assert set(response.headers["allow"].split(", ")) == {"POST", "OPTIONS"}
    assert (await client.options("/nowhere")).status_code == 404
