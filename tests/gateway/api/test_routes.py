"""The routes, in memory: models, health, images, the queue, clients that leave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import InvalidRequestError, QueueFullError, UnavailableError
from support.asgi_client import LeavingClient
from support.fake_backend import FakeBackend, in_memory, until, until_sample

GENERATIONS = "/v1/images/generations"
AWAY = UnavailableError("Triton is away", retry_after=2)


def grey_levels(response: httpx.Response) -> list[tuple[tuple[int, int], Any]]:
    images = [
        Image.open(io.BytesIO(base64.b64decode(image["b64_json"], validate=True))) for image in response.json()["data"]
    ]
    return [(image.size, image.getpixel((0, 0))) for image in images]


class TestModels:
    async def test_the_list_has_exactly_the_served_model(self, client: httpx.AsyncClient) -> None:
        body = (await client.get("/v1/models")).json()
        created = body["data"][0].pop("created")
        assert body == {
            "object": "list",
            "data": [{"id": "acme/tiny-emoji", "object": "model", "owned_by": "hypergen"}],
        }
        assert isinstance(created, int)
        assert abs(created - time.time()) < 5

    @pytest.mark.parametrize("path", ["acme/tiny-emoji", "acme%2Ftiny-emoji", "acme%2ftiny-emoji"])
    async def test_one_model_is_found_with_its_slash_escaped_or_not(self, client: httpx.AsyncClient, path: str) -> None:
        response = await client.get(f"/v1/models/{path}")
        assert response.status_code == 200
        assert response.json()["id"] == "acme/tiny-emoji"

    @pytest.mark.parametrize("path", ["tiny-emoji", "ACME/tiny-emoji", "acme%252Ftiny-emoji", "x"])
    async def test_any_other_id_is_not_found(self, client: httpx.AsyncClient, path: str) -> None:
        response = await client.get(f"/v1/models/{path}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"

    @pytest.mark.parametrize("configured", ["/srv/my models/sd", "./here", "org/name"])
    async def test_a_configured_id_is_told_to_the_letter(self, backend: FakeBackend, configured: str) -> None:
        async with in_memory(create_app(Config(model_id=configured), backend)) as client:
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == configured
            escaped = configured.replace("/", "%2F").replace(" ", "%20")
            assert (await client.get(f"/v1/models/{escaped}")).json()["id"] == configured

    async def test_a_configured_id_needs_no_triton_and_an_unknown_one_is_a_503(self, backend: FakeBackend) -> None:
        backend.description = AWAY
        async with in_memory(create_app(Config(model_id="x"), backend)) as client:
            assert (await client.get("/v1/models")).status_code == 200
        async with in_memory(create_app(Config(), backend)) as client:
            response = await client.get("/v1/models")
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")


class TestHealth:
    async def test_an_idle_server_is_healthy(self, client: httpx.AsyncClient) -> None:
        expected = {"status": "healthy", "model": "acme/tiny-emoji", "queue_size": 0, "device": "cpu"}
        for path in ("/health", "/health/ready"):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (200, expected)

    async def test_a_triton_that_is_not_ready_shows_in_the_body_and_in_the_status_of_ready_alone(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.is_ready = False
        for path, status in (("/health", 200), ("/health/ready", 503)):
            response = await client.get(path)
            assert (response.status_code, response.json()["status"]) == (status, "unhealthy")
            assert response.json()["device"] == "cpu"

    async def test_a_triton_that_never_answered_leaves_model_and_device_unknown(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.description, backend.is_ready = AWAY, False
        expected = {"status": "unhealthy", "model": None, "queue_size": 0, "device": None}
        assert (await client.get("/health")).json() == expected

    async def test_a_triton_that_hangs_does_not_hang_health(self, backend: FakeBackend) -> None:
        backend.answering.clear()
        async with in_memory(create_app(Config(probe_timeout=0.1), backend)) as client:
            began = time.perf_counter()
            assert (await client.get("/health")).json()["status"] == "unhealthy"
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
            assert time.perf_counter() - began < 1

    async def test_queue_size_counts_the_requests_that_wait(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        requests = [asyncio.create_task(client.post(GENERATIONS, json={"prompt": "a", "n": 2})) for _ in range(5)]
        await until_sample(client, "queued_requests", 3)
        assert (await client.get("/health")).json()["queue_size"] == 3
        backend.open.set()
        assert {response.status_code for response in await asyncio.gather(*requests)} == {200}
        assert (await client.get("/health")).json()["queue_size"] == 0
        assert backend.most_running_images == 4


class TestGenerations:
    async def test_a_prompt_alone_gives_an_image_of_the_model_s_own_size(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a fox"})
        body = response.json()
        seed = body["data"][0]["seed"]
        assert response.status_code == 200
        assert grey_levels(response) == [((64, 48), (seed % 256,) * 3)]
        assert backend.generations[0].seed == seed
        assert set(body) == {"created", "background", "output_format", "quality", "size", "data", "usage"}
        assert (body["background"], body["output_format"], body["quality"]) == ("opaque", "png", "medium")

    async def test_n_images_come_in_order_with_consecutive_seeds(self, client: httpx.AsyncClient) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "n": 3, "seed": 100, "size": "32x40"})
        assert grey_levels(response) == [((32, 40), (level,) * 3) for level in (100, 101, 102)]
        assert [image["seed"] for image in response.json()["data"]] == [100, 101, 102]

    async def test_the_size_is_told(self, client: httpx.AsyncClient) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "size": "1024x1024"})
        assert response.json()["size"] == "1024x1024"

    @pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
    async def test_the_file_is_of_the_format_asked_for(self, client: httpx.AsyncClient, name: str) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "a", "output_format": name, "seed": 100})
        (image,) = response.json()["data"]
        decoded = Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))
        assert (decoded.format, response.json()["output_format"]) == (name.upper(), name)
        assert decoded.getpixel((0, 0)) == (100, 100, 100)

    async def test_compression_makes_the_file_smaller(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "a", "output_format": "jpeg", "size": "512x512"}
        small, large = [
            (await client.post(GENERATIONS, json=body | {"output_compression": level})).json() for level in (1, 100)
        ]
        assert len(small["data"][0]["b64_json"]) < len(large["data"][0]["b64_json"])

    async def test_usage_is_what_the_text_encoder_read_and_the_squares_generated(
        self, client: httpx.AsyncClient
    ) -> None:
        response = await client.post(GENERATIONS, json={"prompt": "two words", "n": 2, "size": "64x64"})
        assert response.json()["usage"] == {
            "input_tokens": 2,
            "output_tokens": 128,
            "total_tokens": 130,
            "input_tokens_details": {"text_tokens": 2, "image_tokens": 0},
        }

    async def test_server_timing_says_where_the_time_went_waiting_included(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        first, second = (asyncio.create_task(client.post(GENERATIONS, json={"prompt": "a", "n": 4})) for _ in range(2))
        await until_sample(client, "queued_requests", 1)
        queued = time.perf_counter()
        await asyncio.sleep(0.1)
        waited = time.perf_counter() - queued
        backend.open.set()
        timings = [answer.headers["server-timing"].split(", ") for answer in await asyncio.gather(first, second)]
        phases = dict(phase.split(";dur=") for phase in timings[1])
        assert list(phases) == ["queue", "encode-text", "denoise", "decode", "encode-image"]
        # One millisecond of each is the backend's own queue; the second waited for the first, too.
        assert float(phases["queue"]) >= 1000 * waited
        assert (phases["encode-text"], phases["decode"]) == ("2.0", "4.0")
        assert float(phases["denoise"]) >= 30.0

    @pytest.mark.parametrize(
        ("failure", "status", "param"),
        [
            (InvalidRequestError("Invalid value for 'size': too large", "size"), 400, "size"),
            (QueueFullError("full"), 429, None),
            (AWAY, 503, None),
        ],
    )
    async def test_the_backend_s_errors_reach_the_client(
        self, client: httpx.AsyncClient, backend: FakeBackend, failure: Exception, status: int, param: str | None
    ) -> None:
        backend.failure = failure
        response = await client.post(GENERATIONS, json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)
        assert ("retry-after" in response.headers) == (status in (429, 503))

    async def test_an_unknown_model_description_is_a_503(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        backend.description = AWAY
        assert (await client.post(GENERATIONS, json={"prompt": "a"})).status_code == 503

    async def test_fewer_images_than_asked_for_are_a_500_rather_than_a_short_answer(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.missing_images = 1
        assert (await client.post(GENERATIONS, json={"prompt": "a", "n": 2})).status_code == 500

    async def test_work_that_takes_too_long_is_stopped_and_a_504(self, backend: FakeBackend) -> None:
        backend.open.clear()
        async with in_memory(create_app(Config(request_timeout=0.1), backend)) as client:
            response = await client.post(GENERATIONS, json={"prompt": "a"})
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        await until(lambda: backend.running == 0)

    async def test_work_that_is_cancelled_from_below_is_a_503(self, backend: FakeBackend) -> None:
        backend.failure = asyncio.CancelledError()  # type: ignore[assignment]
        async with in_memory(create_app(Config(), backend)) as client:
            assert (await client.post(GENERATIONS, json={"prompt": "a"})).status_code == 503

    async def test_one_request_more_than_may_wait_is_a_429_with_both_retry_headers(self, backend: FakeBackend) -> None:
        backend.open.clear()
        async with in_memory(create_app(Config(max_queue_size=1), backend)) as client:
            body = {"prompt": "a", "n": 4}
            requests = [asyncio.create_task(client.post(GENERATIONS, json=body)) for _ in range(2)]
            await until_sample(client, "queued_requests", 1)
            refused = await client.post(GENERATIONS, json=body)
            backend.open.set()
            assert [response.status_code for response in await asyncio.gather(*requests)] == [200, 200]
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")


class TestClientsThatLeave:
    async def test_leaving_stops_the_work_and_is_logged_as_499(
        self, backend: FakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "hypergen_gateway.access")
        backend.open.clear()
        client = LeavingClient(create_app(Config(), backend), GENERATIONS, {"prompt": "a"})
        await until(lambda: backend.running == 1)
        await client.leave()
        await until(lambda: backend.running == 0)
        assert client.statuses == [499]
        assert f"POST {GENERATIONS} 499" in caplog.text

    async def test_leaving_the_queue_frees_the_place(self, backend: FakeBackend) -> None:
        backend.open.clear()
        app = create_app(Config(), backend)
        working, waiting = (LeavingClient(app, GENERATIONS, {"prompt": "a", "n": 4}) for _ in range(2))
        async with in_memory(app) as client:
            await until_sample(client, "queued_requests", 1)
            assert (await client.get("/health")).json()["queue_size"] == 1
            await waiting.leave()
            assert (await client.get("/health")).json()["queue_size"] == 0
        assert len(backend.generations) == 1
        await working.leave()

    async def test_leaving_in_the_middle_of_the_body_is_a_499_too(self, backend: FakeBackend) -> None:
        client = LeavingClient(create_app(Config(), backend), GENERATIONS, {"prompt": "a"}, whole=False)
        await client.leave()
        assert client.statuses == [499]
        assert backend.generations == []


async def test_a_request_cut_off_by_the_server_s_end_still_gets_an_openai_error(backend: FakeBackend) -> None:
    backend.open.clear()
    client = LeavingClient(create_app(Config(), backend), GENERATIONS, {"prompt": "a"})
    await until(lambda: backend.running == 1)
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.task
    assert client.statuses == [503]
    assert json.loads(client.content)["error"]["code"] == "service_unavailable"
    await until(lambda: backend.running == 0)


async def test_the_app_closes_the_backend_and_starts_without_triton(backend: FakeBackend) -> None:
    backend.description = AWAY
    app = create_app(Config(), backend)
    async with app.router.lifespan_context(app):
        assert not backend.closed
    assert backend.closed
