"""What a client is told of its place and its time, and what is refused because it would come too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory, on_loopback, until

GENERATIONS = "/v1/images/generations"
FOX = {"prompt": "a fox", "n": 4}  # as many as the backend generates at a time


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(Config(heartbeat_interval=0.05), backend)) as client:
        yield client


async def generate_slowly(client: httpx.AsyncClient, backend: FakeBackend, seconds: float = 0.3) -> httpx.Response:
    """Four images of 20 steps each, that take about `seconds`."""
    backend.open.clear()
    request = asyncio.create_task(client.post(GENERATIONS, json=FOX))
    await until(lambda: backend.running == 1)
    await asyncio.sleep(seconds)
    backend.open.set()
    return await request


def milliseconds_of(response: httpx.Response) -> int:
    """What it took, on a machine that may have other things to do."""
    return int(response.headers["openai-processing-ms"])


async def test_position_and_estimate_are_in_the_headers_once_there_is_a_measurement(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    first = await generate_slowly(client, backend)
    assert first.headers["x-hypergen-queue-position"] == "0"
    assert "x-hypergen-estimated-ms" not in first.headers
    backend.open.clear()
    requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX)) for _ in range(3)]
    await until(lambda: backend.running == 1)
    await asyncio.sleep(0.05)
    backend.open.set()
    told = [response.headers for response in await asyncio.gather(*requests)]
    assert [headers["x-hypergen-queue-position"] for headers in told] == ["0", "1", "2"]
    estimates = [int(headers["x-hypergen-estimated-ms"]) for headers in told]
    took = milliseconds_of(first)
    assert estimates == pytest.approx([took * 1.1, took * 2.2, took * 3.3], rel=0.3)


async def test_a_stream_tells_them_too(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    took = milliseconds_of(await generate_slowly(client, backend))
    response = await client.post(GENERATIONS, json=FOX | {"stream": True})
    assert response.headers["x-hypergen-queue-position"] == "0"
    assert int(response.headers["x-hypergen-estimated-ms"]) == pytest.approx(took * 1.1, rel=0.3)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_that_cannot_be_met_is_a_429_at_once(
    client: httpx.AsyncClient, backend: FakeBackend, stream: bool
) -> None:
    await generate_slowly(client, backend)
    response = await client.post(GENERATIONS, json=FOX | {"deadline_ms": 100, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "deadline_too_short")
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    assert len(backend.generations) == 1


async def test_a_deadline_that_could_be_met_later_says_when(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    took = milliseconds_of(await generate_slowly(client, backend))
    backend.open.clear()
    working = asyncio.create_task(client.post(GENERATIONS, json=FOX))
    await until(lambda: backend.running == 1)
    refused = await client.post(GENERATIONS, json=FOX | {"deadline_ms": took * 3 // 2})
    assert refused.status_code == 429
    assert "x-should-retry" not in refused.headers
    assert took // 6 < int(refused.headers["retry-after-ms"]) < took * 4 // 3
    backend.open.set()
    assert (await working).status_code == 200


async def test_a_deadline_that_nobody_can_judge_bounds_the_request(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.open.clear()
    response = await client.post(GENERATIONS, json=FOX | {"deadline_ms": 100})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert "0.1 seconds" in response.json()["error"]["message"]
    await until(lambda: backend.running == 0)


@pytest.mark.parametrize("value", [0, -5, 1.5, "100", True])
async def test_what_is_no_deadline_is_told_so(client: httpx.AsyncClient, value: object) -> None:
    response = await client.post(GENERATIONS, json=FOX | {"deadline_ms": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "deadline_ms")


@pytest.mark.parametrize("header", ["x-stainless-read-timeout", "x-stainless-timeout"])
async def test_a_client_s_read_timeout_is_a_deadline_but_not_in_a_stream_with_heartbeats(
    client: httpx.AsyncClient, backend: FakeBackend, header: str
) -> None:
    await generate_slowly(client, backend)
    assert (await client.post(GENERATIONS, json=FOX, headers={header: "0.1"})).status_code == 429
    backend.open.clear()
    asyncio.get_running_loop().call_later(0.25, backend.open.set)
    response = await client.post(GENERATIONS, json=FOX | {"stream": True}, headers={header: "0.1"})
    assert response.status_code == 200
    assert response.text.count(": ping") >= 3
    assert response.text.count("event: image_generation.completed") == 4


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "inf", "1e999"])
async def test_an_invalid_timeout_is_ignored(client: httpx.AsyncClient, value: str) -> None:
    headers = {"x-stainless-read-timeout": value}
    assert (await client.post(GENERATIONS, json=FOX, headers=headers)).status_code == 200


async def test_openai_s_client_with_a_timeout_too_short_is_told_at_once_and_does_not_retry(
    backend: FakeBackend,
) -> None:
    app = create_app(Config(), backend)
    async with on_loopback(app) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
        async with httpx.AsyncClient(base_url=url) as plain:
            await generate_slowly(plain, backend)
        with pytest.raises(openai.RateLimitError, match="even on an idle server") as raised:
            await sdk.images.generate(prompt="a fox", n=4, timeout=0.1)
        assert raised.value.code == "deadline_too_short"
        assert len(backend.generations) == 1
