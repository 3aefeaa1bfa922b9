"""Streams: the framing to the byte, the order of events, and how a stream ends."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import InvalidRequestError, QueueFullError, UnavailableError
from support.asgi_client import LeavingClient
from support.fake_backend import FakeBackend, in_memory, on_loopback, until

GENERATIONS = "/v1/images/generations"
STREAM: dict[str, Any] = {"prompt": "a fox", "stream": True}
FRAME = re.compile(rb"event: (image_generation\.(?:partial_image|completed))\ndata: (\{[^\n]*\})\n\n")


def events_in(content: bytes) -> list[dict[str, Any]]:
    """The events of a stream that consists of nothing but well-framed ones."""
    frames = list(FRAME.finditer(content))
    assert b"".join(frame[0] for frame in frames) == content
    events = [json.loads(frame[2]) for frame in frames]
    assert [event["type"] for event in events] == [frame[1].decode() for frame in frames]
    return events


@asynccontextmanager
async def streaming(client: httpx.AsyncClient, **fields: Any) -> AsyncIterator[httpx.Response]:
    async with client.stream("POST", GENERATIONS, json=STREAM | fields, timeout=10) as response:
        yield response


async def stream(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    async with streaming(client, **fields) as response:
        await response.aread()
        return response


class TestFrames:
    async def test_a_stream_is_previews_then_the_image_and_nothing_else(self, client: httpx.AsyncClient) -> None:
        response = await stream(client, partial_images=3, seed=9)
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert "content-length" not in response.headers
        events = events_in(response.content)
        assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
        assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]
        assert events[-1]["seed"] == 9

    async def test_the_fields_are_those_of_openai_s_schema_and_our_extensions(self, client: httpx.AsyncClient) -> None:
        partial, completed = events_in((await stream(client, partial_images=1, size="1024x1024")).content)
        shared = {
            "type", "b64_json", "created_at", "size", "quality", "background", "output_format", "image_index",
        }  # fmt: skip
        assert set(partial) == shared | {"partial_image_index"}
        assert set(completed) == shared | {"usage", "seed"}
        assert abs(completed["created_at"] - time.time()) < 5
        assert [(event["size"], event["quality"], event["background"]) for event in (partial, completed)] == [
            ("1024x1024", "medium", "opaque")
        ] * 2

    @pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
    async def test_every_event_s_image_is_of_the_format_asked_for(self, client: httpx.AsyncClient, name: str) -> None:
        for event in events_in((await stream(client, partial_images=1, output_format=name)).content):
            image = Image.open(io.BytesIO(base64.b64decode(event["b64_json"], validate=True)))
            assert (image.format, image.size, event["output_format"]) == (name.upper(), (64, 48), name)

    async def test_without_previews_there_is_one_event(self, client: httpx.AsyncClient) -> None:
        assert len(events_in((await stream(client)).content)) == 1

    async def test_each_of_several_images_has_its_events_and_its_seed(self, client: httpx.AsyncClient) -> None:
        events = events_in((await stream(client, n=3, partial_images=2, seed=5)).content)
        partials = [event for event in events if event["type"].endswith("partial_image")]
        completed = [event for event in events if event["type"].endswith("completed")]
        assert sorted((event["image_index"], event["partial_image_index"]) for event in partials) == [
            (index, number) for index in range(3) for number in range(2)
        ]
        assert sorted((event["image_index"], event["seed"]) for event in completed) == [(0, 5), (1, 6), (2, 7)]

    async def test_a_preview_arrives_while_the_image_is_still_generated(self, backend: FakeBackend) -> None:
        backend.finishing.clear()
        async with (
            on_loopback(create_app(Config(), backend)) as url,
            httpx.AsyncClient(base_url=url) as client,
            streaming(client, partial_images=1) as response,
        ):
            chunks = response.aiter_bytes()
            (preview,) = events_in(await anext(chunks))
            assert preview["type"] == "image_generation.partial_image"
            assert backend.running == 1
            backend.finishing.set()
            (completed,) = events_in(b"".join([chunk async for chunk in chunks]))
        assert completed["type"] == "image_generation.completed"


class TestQuiet:
    async def test_a_quiet_stream_is_kept_alive_by_comments_from_its_first_wait_on(self, backend: FakeBackend) -> None:
        backend.open.clear()
        app = create_app(Config(heartbeat_interval=0.05), backend)
        async with on_loopback(app) as url, httpx.AsyncClient(base_url=url) as client, streaming(client) as response:
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if content.count(b": ping\n\n") == 3:
                    backend.open.set()
        assert content.startswith(b": ping\n\n: ping\n\n: ping\n\n")
        assert len(events_in(content.replace(b": ping\n\n", b""))) == 1


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "status"),
        [
            (InvalidRequestError("Invalid value for 'size': too large", "size"), 400),
            (QueueFullError("full"), 429),
            (UnavailableError("away"), 503),
            (RuntimeError("/srv/secret"), 500),
        ],
    )
    async def test_what_fails_before_the_first_event_is_a_plain_error(
        self, client: httpx.AsyncClient, backend: FakeBackend, failure: Exception, status: int
    ) -> None:
        backend.failure = failure
        response = await stream(client, partial_images=1)
        assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert ("retry-after" in response.headers) == (status in (429, 503))

    @pytest.mark.parametrize(
        ("failure", "code"),
        [
            (UnavailableError("away"), "service_unavailable"),
            (RuntimeError("/srv/secret"), "internal_error"),
            (asyncio.CancelledError(), "service_unavailable"),
        ],
    )
    async def test_what_fails_later_is_the_stream_s_last_event(
        self, client: httpx.AsyncClient, backend: FakeBackend, failure: Exception, code: str
    ) -> None:
        backend.late_failure = failure
        response = await stream(client, partial_images=1)
        head, data, tail = response.content.rpartition(b"data: ")
        assert (response.status_code, len(events_in(head))) == (200, 1)
        assert tail.endswith(b"}\n\n")
        error = json.loads(tail)["error"]
        assert (data, error["code"], set(error)) == (b"data: ", code, {"message", "type", "param", "code"})
        assert b"secret" not in tail

    async def test_an_image_that_is_missing_at_the_end_is_an_error_too(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.missing_images = 1
        response = await stream(client, n=2)
        assert json.loads(response.content.rpartition(b"data: ")[2])["error"]["code"] == "internal_error"

    async def test_time_that_runs_out_is_a_504_before_the_first_event_and_an_event_after_it(
        self, backend: FakeBackend
    ) -> None:
        async with in_memory(create_app(Config(request_timeout=0.2), backend)) as client:
            backend.finishing.clear()
            content = (await stream(client, partial_images=1)).content
            assert json.loads(content.rpartition(b"data: ")[2])["error"]["code"] == "timeout"
            backend.open.clear()
            assert (await stream(client)).status_code == 504
        await until(lambda: backend.running == 0)


class TestDepartures:
    async def test_leaving_before_the_first_event_stops_the_work(self, backend: FakeBackend) -> None:
        backend.open.clear()
        client = LeavingClient(create_app(Config(), backend), GENERATIONS, STREAM)
        await until(lambda: backend.running == 1)
        await client.leave()
        await until(lambda: backend.running == 0)
        assert client.statuses == [499]

    async def test_leaving_in_the_middle_stops_the_work(self, backend: FakeBackend) -> None:
        backend.finishing.clear()
        client = LeavingClient(create_app(Config(), backend), GENERATIONS, STREAM | {"partial_images": 1})
        await until(lambda: len(client.sent) == 2)
        assert backend.running == 1
        await client.leave()
        await until(lambda: backend.running == 0)

    async def test_a_stream_that_the_server_s_end_cuts_off_says_so(self, backend: FakeBackend) -> None:
        backend.finishing.clear()
        client = LeavingClient(create_app(Config(), backend), GENERATIONS, STREAM | {"partial_images": 1})
        await until(lambda: len(client.sent) == 2)
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
        last = client.sent[-1]
        assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "service_unavailable"
        assert last["more_body"] is False
        await until(lambda: backend.running == 0)
