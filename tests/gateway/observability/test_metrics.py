"""The gateway's own metrics, read back with Prometheus' own parser."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from support.fake_backend import FakeBackend, in_memory, on_loopback, until, until_sample
from support.running_server import samples_of

GENERATIONS = "/v1/images/generations"
FOX = {"prompt": "a fox"}


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return samples_of(response.text, "hypergen_gateway_")


async def test_requests_are_counted_by_route_method_and_status(client: httpx.AsyncClient) -> None:
    await client.post(GENERATIONS, json=FOX)
    await client.post(GENERATIONS, json={})
    await client.get("/v1/models/acme/tiny-emoji")
    await client.get("/v1/models/no/such")
    await client.get("/nowhere")
    await client.request("BREW", "/nowhere")
    await client.get(GENERATIONS)
    seen = await metrics(client)
    counted = {name: value for name, value in seen.items() if name.startswith("requests_total")}
    assert counted == {
        'requests_total{method="POST",route="/v1/images/generations",status="200"}': 1,
        'requests_total{method="POST",route="/v1/images/generations",status="400"}': 1,
        'requests_total{method="GET",route="/v1/images/generations",status="405"}': 1,
        'requests_total{method="GET",route="/v1/models/{id:path}",status="200"}': 1,
        'requests_total{method="GET",route="/v1/models/{id:path}",status="404"}': 1,
        'requests_total{method="GET",route="other",status="404"}': 1,
        'requests_total{method="other",route="other",status="404"}': 1,
    }
    assert seen['request_seconds_count{route="/v1/images/generations"}'] == 3


async def test_images_steps_and_phases_are_counted(client: httpx.AsyncClient) -> None:
    await client.post(GENERATIONS, json=FOX | {"n": 2, "stream": True, "partial_images": 3})
    seen = await metrics(client)
    assert (seen['images_total{kind="image"}'], seen['images_total{kind="preview"}']) == (2, 6)
    assert seen["steps_total"] == 40
    assert seen['first_image_seconds_count{kind="preview"}'] == seen['first_image_seconds_count{kind="image"}'] == 1
    # Of two images of at least 30 ms each; longer if this machine is busy.
    assert seen['phase_seconds_sum{phase="denoise"}'] >= 2 * 0.030 - 1e-6
    phases = {name for name in seen if name.startswith("phase_seconds_count")}
    assert len(phases) == 5


async def test_the_queue_and_running_requests_are_reported(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.open.clear()
    requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX | {"n": 2})) for _ in range(3)]
    await until_sample(client, "queued_requests", 1)
    seen = await metrics(client)
    assert (seen["queued_requests"], seen["active_requests"], seen["active_images"]) == (1, 2, 4)
    backend.open.set()
    await asyncio.gather(*requests)
    seen = await metrics(client)
    assert (seen["queued_requests"], seen["active_requests"], seen["active_images"]) == (0, 0, 0)


async def test_refusals_joins_and_estimates_are_counted(backend: FakeBackend) -> None:
    async with in_memory(create_app(Config(max_queue_size=0), backend)) as client:
        for _ in range(2):
            await client.post(GENERATIONS, json=FOX | {"n": 4}, headers={"Idempotency-Key": "a"})
        backend.open.clear()
        asyncio.get_running_loop().call_later(0.03, backend.open.set)  # what was as good as nothing forbids nothing
        await client.post(GENERATIONS, json=FOX | {"n": 4})
        await client.post(GENERATIONS, json=FOX | {"num_inference_steps": 150, "deadline_ms": 1})
        backend.open.clear()
        working = asyncio.create_task(client.post(GENERATIONS, json=FOX | {"n": 4}))
        await until(lambda: backend.running == 1)
        assert (await client.post(GENERATIONS, json=FOX)).status_code == 429
        backend.open.set()
        await working
        seen = await metrics(client)
    assert (seen['joined_total{reason="idempotency_key"}'], seen['joined_total{reason="retry"}']) == (1, 0)
    assert (
        seen['admission_rejections_total{reason="queue_full"}'],
        seen['admission_rejections_total{reason="deadline"}'],
    ) == (1, 1)
    assert seen["estimate_ratio_count"] == 2


async def test_steps_that_nobody_wanted_any_more_are_counted_once(backend: FakeBackend) -> None:
    """All of a request's that still waited, and of one at work what the pace leaves."""
    async with on_loopback(create_app(Config(), backend)) as url, httpx.AsyncClient(base_url=url) as client:
        backend.open.clear()
        body = FOX | {"n": 4, "num_inference_steps": 10}
        working = asyncio.create_task(client.post(GENERATIONS, json=body))
        await until(lambda: backend.running == 1)
        waiting = asyncio.create_task(client.post(GENERATIONS, json=body))
        await until_sample(client, "queued_requests", 1)
        waiting.cancel()
        await until_sample(client, "saved_steps_total", 40)
        working.cancel()
        await until_sample(client, "saved_steps_total", 80)


async def test_a_failure_of_the_backend_saves_nothing(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.failure = UnavailableError("away")
    await client.post(GENERATIONS, json=FOX)
    seen = await metrics(client)
    assert (seen["saved_steps_total"], seen['admission_rejections_total{reason="queue_full"}']) == (0, 0)


@pytest.mark.parametrize(("needs_key", "status"), [(False, 200), (True, 401)])
async def test_scrapers_need_a_key_only_if_told_so(backend: FakeBackend, needs_key: bool, status: int) -> None:
    async with in_memory(create_app(Config(api_key="secret", metrics_need_key=needs_key), backend)) as client:
        assert (await client.get("/metrics")).status_code == status
        assert (await client.get("/metrics", headers={"Authorization": "Bearer secret"})).status_code == 200


async def test_two_gateways_in_one_process_count_apart(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await client.post(GENERATIONS, json=FOX)
    async with in_memory(create_app(Config(), backend)) as other:
        assert "steps_total" in await metrics(other)
        assert (await metrics(other))["steps_total"] == 0


async def test_every_metric_says_what_it_is(client: httpx.AsyncClient) -> None:
    families = list(text_string_to_metric_families((await client.get("/metrics")).text))
    assert all(family.documentation for family in families)
    assert {family.name.partition("_")[0] for family in families} == {"hypergen", "process"}
