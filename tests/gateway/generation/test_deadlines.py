"""What a client is told of its place and its time, and what is refused because it would come too late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import openai
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory, on_loopback, until, until_sample

GENERATIONS = "/v1/images/generations"
FOX = {"prompt": "a fox", "n": 4}  # as many as the backend generates at a time


@dataclass
class Clock:
    """The time by which estimates are made: it stands still unless a test moves it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend(clock: Clock) -> FakeBackend:
    return FakeBackend(clock)


@pytest.fixture
async def client(backend: FakeBackend, clock: Clock) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(Config(), backend, clock=clock)) as client:
        yield client


async def generate_slowly(
    client: httpx.AsyncClient, backend: FakeBackend, clock: Clock, seconds: float = 60
) -> httpx.Response:
    """Four images of 20 steps each, that take `seconds`."""
    backend.open.clear()
    request = asyncio.create_task(client.post(GENERATIONS, json=FOX))
    await until(lambda: backend.running == 1)
    clock.now += seconds
    backend.open.set()
    return await request


async def test_position_and_estimate_are_in_the_headers_once_there_is_a_measurement(
    client: httpx.AsyncClient, backend: FakeBackend, clock: Clock
) -> None:
    first = await generate_slowly(client, backend, clock)
    assert first.headers["x-hypergen-queue-position"] == "0"
    assert "x-hypergen-estimated-ms" not in first.headers
    backend.open.clear()
    requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX)) for _ in range(3)]
    await until(lambda: backend.running == 1)
    backend.open.set()
    told = [response.headers for response in await asyncio.gather(*requests)]
    assert [headers["x-hypergen-queue-position"] for headers in told] == ["0", "1", "2"]
    assert [headers["x-hypergen-estimated-ms"] for headers in told] == ["60000", "120000", "180000"]


async def test_a_running_request_counts_with_its_remaining_steps(
    client: httpx.AsyncClient, backend: FakeBackend, clock: Clock
) -> None:
    await generate_slowly(client, backend, clock)
    backend.open.clear()
    requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX))]
    await until(lambda: backend.running == 1)
    clock.now += 45
    requests.append(asyncio.create_task(client.post(GENERATIONS, json=FOX | {"deadline_ms": 75_000})))
    await until_sample(client, "queued_requests", 1)
    refused = await client.post(GENERATIONS, json=FOX | {"deadline_ms": 130_000})
    backend.open.set()
    assert (await requests[1]).headers["x-hypergen-estimated-ms"] == "75000"
    assert refused.headers["retry-after-ms"] == "5000"
    assert (await requests[0]).status_code == 200


async def test_a_stream_tells_them_too(client: httpx.AsyncClient, backend: FakeBackend, clock: Clock) -> None:
    await generate_slowly(client, backend, clock)
    response = await client.post(GENERATIONS, json=FOX | {"stream": True})
    assert response.headers["x-hypergen-queue-position"] == "0"
    assert response.headers["x-hypergen-estimated-ms"] == "60000"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_that_cannot_be_met_is_a_429_at_once(
    client: httpx.AsyncClient, backend: FakeBackend, clock: Clock, stream: bool
) -> None:
    await generate_slowly(client, backend, clock)
    response = await client.post(GENERATIONS, json=FOX | {"deadline_ms": 59_999, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "deadline_too_short")
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    assert len(backend.generations) == 1


async def test_a_deadline_that_could_be_met_later_says_when(
    client: httpx.AsyncClient, backend: FakeBackend, clock: Clock
) -> None:
    await generate_slowly(client, backend, clock)
    backend.open.clear()
    working = asyncio.create_task(client.post(GENERATIONS, json=FOX))
    await until(lambda: backend.running == 1)
    refused = await client.post(GENERATIONS, json=FOX | {"deadline_ms": 90_000})
    assert refused.status_code == 429
    assert "x-should-retry" not in refused.headers
    assert refused.headers["retry-after-ms"] == "30000"
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
async def test_a_client_s_read_timeout_is_a_deadline(
    client: httpx.AsyncClient, backend: FakeBackend, clock: Clock, header: str
) -> None:
    await generate_slowly(client, backend, clock)
    assert (await client.post(GENERATIONS, json=FOX, headers={header: "59.9"})).status_code == 429
    assert (await client.post(GENERATIONS, json=FOX, headers={header: "60"})).status_code == 200


@pytest.mark.parametrize("header", ["x-stainless-read-timeout", "x-stainless-timeout"])
async def test_a_client_s_read_timeout_is_no_deadline_in_a_stream_with_heartbeats(
    backend: FakeBackend, clock: Clock, header: str
) -> None:
    app = create_app(Config(), backend, clock=clock)
    async with on_loopback(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        await generate_slowly(client, backend, clock)
        backend.open.clear()
        stream = client.stream("POST", GENERATIONS, json=FOX | {"stream": True}, headers={header: "0.1"})
        lines = list[str]()
        async with stream as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                lines.append(line)
                if lines.count(": ping") == 3:  # each after half of the timeout
                    backend.open.set()
    assert lines.count("event: image_generation.completed") == 4


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "inf", "1e999"])
async def test_an_invalid_timeout_is_ignored(client: httpx.AsyncClient, value: str) -> None:
    headers = {"x-stainless-read-timeout": value}
    assert (await client.post(GENERATIONS, json=FOX, headers=headers)).status_code == 200


async def test_openai_s_client_with_a_timeout_too_short_is_told_at_once_and_does_not_retry(
    backend: FakeBackend, clock: Clock
) -> None:
    app = create_app(Config(), backend, clock=clock)
    async with on_loopback(app) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
        async with httpx.AsyncClient(base_url=url, timeout=60) as plain:
            await generate_slowly(plain, backend, clock, seconds=3600)
        with pytest.raises(openai.RateLimitError, match="even on an idle server") as raised:
            await sdk.images.generate(prompt="a fox", n=4, timeout=60)
        assert raised.value.code == "deadline_too_short"
        assert len(backend.generations) == 1
