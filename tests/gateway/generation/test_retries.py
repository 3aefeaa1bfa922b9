"""Requests that are asked again: what is done once, what is done anew, and what becomes of work whose client left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from hypergen_gateway.api.client_request import to_generation_request
from hypergen_gateway.api.fields import ImageRequest
from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.admission import Admission
from hypergen_gateway.generation.jobs import Jobs, RetentionPolicy
from hypergen_gateway.generation.request import Client, ClientRequest, SubRequest
from hypergen_gateway.generation.service import ImageService
from support.cutting_proxy import CuttingProxy, cutting_proxy
from support.fake_backend import MODEL, FakeBackend, gateway_samples, in_memory, on_loopback, until, until_sample
from support.image_files import file_of, hole, photo
from support.node_client import run_node_client

KEY = "sk-correct-horse"
GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
FOX = {"prompt": "a fox"}
FOX_THAT_MAY_RETURN = ClientRequest(
    sub_requests=[SubRequest(generation=to_generation_request(ImageRequest(prompt="a fox"), MODEL, 0))],
    model=MODEL,
    client=Client(may_return=True),
    fingerprint="fox",
)
GRACE_SECONDS = 0.5
DEPARTED = 'requests_total{method="POST",route="/v1/images/generations",status="499"}'
JOINED_BY_RETRY, JOINED_BY_KEY = 'joined_total{reason="retry"}', 'joined_total{reason="idempotency_key"}'
FIRST, SECOND = {"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}


def keyed(key: str, **more: str) -> dict[str, str]:
    return {"Idempotency-Key": key, **more}


def seeds_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [image["seed"] for image in response.json()["data"]]


@pytest.fixture
def grace() -> float:
    """How long work goes on without its client: longer than any test, unless one says otherwise."""
    return 3600.0


@pytest.fixture
async def gateway(backend: FakeBackend, grace: float) -> AsyncIterator[str]:
    async with on_loopback(create_app(Config(retry_grace=grace), backend)) as url:
        yield url


@pytest.fixture
async def remote(gateway: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose departures the gateway sees."""
    async with httpx.AsyncClient(base_url=gateway) as client:
        yield client


async def leave(client: httpx.AsyncClient, request: asyncio.Task[httpx.Response]) -> None:
    """Hangs up, and waits until the gateway has noticed."""
    before = (await gateway_samples(client)).get(DEPARTED, 0.0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await until_sample(client, DEPARTED, before + 1)


class TestKeys:
    async def test_the_same_key_and_request_give_the_same_images_without_generating_twice(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        first, second, other = [await client.post(GENERATIONS, json=FOX, headers=keyed(key)) for key in ("a", "a", "b")]
        assert seeds_of(first) == seeds_of(second) != seeds_of(other)
        assert first.json()["data"] == second.json()["data"]
        assert len(backend.generations) == 2

    async def test_it_joins_running_work(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        backend.open.clear()
        requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=keyed("a"))) for _ in range(3)]
        await until(lambda: backend.running == 1)
        backend.open.set()
        assert len({seeds_of(response)[0] for response in await asyncio.gather(*requests)}) == 1
        assert len(backend.generations) == 1

    async def test_the_same_key_with_another_request_is_a_400_that_is_not_tried_again(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        await client.post(GENERATIONS, json=FOX, headers=keyed("a"))
        for other in ({"prompt": "a cat"}, FOX | {"seed": 1}, FOX | {"stream": True}):
            response = await client.post(GENERATIONS, json=other, headers=keyed("a"))
            assert (response.status_code, response.json()["error"]["code"]) == (400, "idempotency_key_reused")
        assert len(backend.generations) == 1

    async def test_order_of_fields_and_fields_that_mean_nothing_do_not_matter(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        for body in ('{"prompt":"a","n":2}', '{"n": 2, "prompt": "a", "x": 7}'):
            headers = keyed("a") | {"Content-Type": "application/json"}
            assert (await client.post(GENERATIONS, content=body, headers=headers)).status_code == 200
        assert len(backend.generations) == 1

    async def test_a_key_belongs_to_its_owner(self, backend: FakeBackend) -> None:
        async with in_memory(create_app(Config(), backend)) as client:
            for owner in ("Bearer one", "Bearer two"):
                await client.post(GENERATIONS, json=FOX, headers=keyed("a", Authorization=owner))
        assert len(backend.generations) == 2

    async def test_an_upload_is_known_by_its_pixels_and_not_by_its_form_s_boundary(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        def again(width: int) -> Any:
            files = {"image": file_of(photo(width, 48))}
            return client.post(EDITS, data=FOX, files=files, headers=keyed("a"))

        assert seeds_of(await again(64)) == seeds_of(await again(64))
        assert (await again(72)).json()["error"]["code"] == "idempotency_key_reused"
        assert len(backend.generations) == 1

    async def test_uploads_are_known_by_what_the_model_does_not_see(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.description = replace(MODEL, max_size=96)

        async def code(key: str, side: int, transparent: int = 0) -> str | None:
            files = {"image": file_of(Image.new("RGB", (side, side), "teal"))}
            if transparent:
                files["mask"] = file_of(hole(side, side, (0, 0, transparent, transparent)))
            response = await client.post(EDITS, data=FOX, files=files, headers=keyed(key))
            error: dict[str, str] = response.json().get("error", {})
            return error.get("code")

        assert [await code("size", side) for side in (960, 960, 480)] == [None, None, "idempotency_key_reused"]
        assert [await code("mask", 960, side) for side in (509, 509, 508)] == [None, None, "idempotency_key_reused"]
        assert len(backend.generations) == 2

    async def test_a_retry_that_reaches_another_gateway_asks_for_the_same_images(self, backend: FakeBackend) -> None:
        async def seeds(key: str, owner: str = "Bearer one", **fields: int | str) -> list[int]:
            """From a gateway that has seen nothing."""
            async with in_memory(create_app(Config(), backend)) as client:
                headers = keyed(key, Authorization=owner)
                return seeds_of(await client.post(GENERATIONS, json=FOX | {"n": 2} | fields, headers=headers))

        first = await seeds("a")
        assert first == await seeds("a") == await seeds("a", seed=-1)
        assert first != await seeds("b")
        assert first != await seeds("a", prompt="a cat")
        # Whoever sees a seed could try out weak API keys.
        assert first == await seeds("a", "Bearer two")
        assert await seeds("a", seed=7) == [7, 8]
        # JavaScript rounds larger ones.
        assert max([seed for number in range(20) for seed in await seeds(str(number))]) < 2**53

    async def test_what_failed_is_done_again(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        backend.failure = UnavailableError("away")
        assert (await client.post(GENERATIONS, json=FOX, headers=keyed("a"))).status_code == 503
        backend.failure = None
        assert seeds_of(await client.post(GENERATIONS, json=FOX, headers=keyed("a")))

    @pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
    async def test_what_is_no_key_is_told_so(self, client: httpx.AsyncClient, key: str) -> None:
        response = await client.post(GENERATIONS, json=FOX, headers={b"Idempotency-Key": key.encode()})
        assert response.status_code == 400
        assert "Idempotency-Key" in response.json()["error"]["message"]

    async def test_a_joined_stream_has_all_events(self, client: httpx.AsyncClient, backend: FakeBackend) -> None:
        body = FOX | {"stream": True, "partial_images": 2}
        first, second = [await client.post(GENERATIONS, json=body, headers=keyed("a")) for _ in range(2)]
        assert first.text.count("event: image_generation.") == 3
        assert second.text.partition("created_at")[0] == first.text.partition("created_at")[0]
        assert second.text.count("event: image_generation.") == 3
        assert len(backend.generations) == 1


class TestKeeping:
    @pytest.mark.parametrize("kept", [{"retry_seconds": 0.05}, {"retry_bytes": 100}])
    async def test_what_is_finished_is_kept_for_a_while_and_within_bounds(
        self, backend: FakeBackend, kept: dict[str, Any]
    ) -> None:
        async with in_memory(create_app(Config(**kept), backend)) as client:
            await client.post(GENERATIONS, json=FOX, headers=keyed("a"))
            await asyncio.sleep(0.1)
            await client.post(GENERATIONS, json=FOX, headers=keyed("a"))
        assert len(backend.generations) == 2

    async def test_the_oldest_goes_first(self, backend: FakeBackend) -> None:
        image = 64 * 48 * 3
        async with in_memory(create_app(Config(retry_bytes=3 * image), backend)) as client:
            for key in "abccb":
                await client.post(GENERATIONS, json=FOX, headers=keyed(key))
            assert len(backend.generations) == 3
            await client.post(GENERATIONS, json=FOX, headers=keyed("a"))
            assert len(backend.generations) == 4


class TestFirstRequests:
    async def test_the_same_request_twice_means_two_images(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=FIRST)) for _ in range(3)]
        await until(lambda: backend.running == 3)
        backend.open.set()
        assert len({seeds_of(response)[0] for response in await asyncio.gather(*requests)}) == 3


class TestRetries:
    async def test_a_retry_joins_the_work_that_its_client_left(
        self, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        others = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=FIRST))
        await until(lambda: backend.running == 1)
        lost = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=FIRST))
        await until(lambda: backend.running == 2)
        others2 = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=FIRST))
        await until(lambda: backend.running == 3)
        await leave(remote, lost)
        again = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=SECOND))
        await until_sample(remote, JOINED_BY_RETRY, 1)
        backend.open.set()
        assert seeds_of(await again) == [backend.generations[1].seed]
        assert [seeds_of(await others), seeds_of(await others2)] == [[backend.generations[i].seed] for i in (0, 2)]
        assert len(backend.generations) == 3

    async def test_a_retry_finds_what_was_finished_while_it_was_away(
        self, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        lost = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=FIRST))
        await until(lambda: backend.running == 1)
        await leave(remote, lost)
        backend.open.set()
        await until(lambda: backend.running == 0)
        assert seeds_of(await remote.post(GENERATIONS, json=FOX, headers=SECOND)) == [backend.generations[0].seed]

    async def test_what_was_finished_without_its_client_is_not_given_up_any_more(self, backend: FakeBackend) -> None:
        retention = RetentionPolicy(grace=3600.0, seconds=60.0, nbytes=1 << 20)
        jobs = Jobs(ImageService(backend, Admission(10)), retention, on_joined=lambda _: None)
        backend.open.clear()
        job = jobs.join(FOX_THAT_MAY_RETURN)
        with job.subscribe():
            await until(lambda: backend.running == 1)
        assert job.expiry is not None
        backend.open.set()
        await asyncio.wait([job.task])
        assert job.expiry is None
        retry = replace(FOX_THAT_MAY_RETURN, client=Client(may_return=True, is_retry=True))
        assert jobs.join(retry) is job

    async def test_a_retry_after_its_client_s_deadline_joins_the_work_that_was_too_late(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        """The gateway may notice the time-out that a client sends along before the client does."""
        backend.open.clear()
        late = await client.post(GENERATIONS, json=FOX, headers=FIRST | {"x-stainless-read-timeout": "0.05"})
        assert (late.status_code, "x-should-retry" in late.headers) == (504, False)
        again = asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=SECOND))
        await until_sample(client, JOINED_BY_RETRY, 1)
        backend.open.set()
        assert seeds_of(await again) == [backend.generations[0].seed]
        assert len(backend.generations) == 1

    async def test_a_retry_whose_client_s_end_nobody_saw_joins_too(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=FIRST))]
        await until(lambda: backend.running == 1)
        requests.append(asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=SECOND)))
        await until_sample(client, JOINED_BY_RETRY, 1)
        backend.open.set()
        first, second = await asyncio.gather(*requests)
        assert seeds_of(first) == seeds_of(second)

    async def test_the_retry_of_a_failure_is_not_answered_with_another_request_s_image(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        received = seeds_of(await client.post(GENERATIONS, json=FOX, headers=FIRST))
        backend.failure = UnavailableError("away")
        assert (await client.post(GENERATIONS, json=FOX, headers=FIRST)).status_code == 503
        backend.failure = None
        assert seeds_of(await client.post(GENERATIONS, json=FOX, headers=SECOND)) != received

    async def test_the_retry_of_a_request_that_never_came_is_not_answered_with_an_old_image(
        self, backend: FakeBackend
    ) -> None:
        retention = RetentionPolicy(grace=1.0, seconds=60.0, nbytes=1 << 20, lost_response=60.0)
        jobs = Jobs(ImageService(backend, Admission(10)), retention, on_joined=lambda _: None)
        first = jobs.join(FOX_THAT_MAY_RETURN)
        assert await first.final_images()
        retry = replace(FOX_THAT_MAY_RETURN, client=Client(may_return=True, is_retry=True))
        assert jobs.join(retry) is first
        assert first.delivered_at is not None
        first.delivered_at -= 60.0
        second = jobs.join(retry)
        assert second is not first
        assert await second.final_images()

    async def test_another_owner_s_or_another_request_s_work_is_never_joined(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        requests = [asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=FIRST))]
        await until(lambda: backend.running == 1)
        stranger = SECOND | {"Authorization": "Bearer other"}
        requests.append(asyncio.create_task(client.post(GENERATIONS, json=FOX, headers=stranger)))
        requests.append(asyncio.create_task(client.post(GENERATIONS, json=FOX | {"n": 2}, headers=SECOND)))
        await until(lambda: backend.running == 3)
        backend.open.set()
        assert all(seeds_of(response) for response in await asyncio.gather(*requests))


class TestDepartures:
    @pytest.mark.parametrize("grace", [GRACE_SECONDS])
    async def test_work_ends_some_time_after_its_client_left(
        self, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        request = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=FIRST))
        await until(lambda: backend.running == 1)
        left = time.monotonic()
        await leave(remote, request)
        await until(lambda: backend.running == 0)
        assert time.monotonic() - left > 0.99 * GRACE_SECONDS
        # What was given up is not there to be joined.
        backend.open.set()
        assert seeds_of(await remote.post(GENERATIONS, json=FOX, headers=SECOND)) != [backend.generations[0].seed]

    async def test_a_client_that_cannot_come_back_is_not_waited_for(
        self, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        request = asyncio.create_task(remote.post(GENERATIONS, json=FOX))
        await until(lambda: backend.running == 1)
        request.cancel()
        await until(lambda: backend.running == 0)

    @pytest.mark.parametrize("grace", [GRACE_SECONDS])
    async def test_work_goes_on_for_the_listener_that_stays(
        self, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        gone, staying = (asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=keyed("a"))) for _ in range(2))
        await until_sample(remote, JOINED_BY_KEY, 1)
        await leave(remote, gone)
        await asyncio.sleep(GRACE_SECONDS + 0.2)
        backend.open.set()
        assert seeds_of(await staying)

    async def test_the_end_of_the_server_ends_work_that_nobody_waits_for(self, backend: FakeBackend) -> None:
        backend.open.clear()
        async with on_loopback(create_app(Config(), backend)) as url, httpx.AsyncClient(base_url=url) as remote:
            request = asyncio.create_task(remote.post(GENERATIONS, json=FOX, headers=FIRST))
            await until(lambda: backend.running == 1)
            await leave(remote, request)
        assert (backend.running, backend.closed) == (0, True)


class TestOpenAIsClients:
    @pytest.fixture
    async def proxy(self, gateway: str) -> AsyncIterator[CuttingProxy]:
        async with cutting_proxy(gateway) as proxy:
            yield proxy

    async def test_python_s_retry_after_a_cut_connection_is_generated_once(
        self, proxy: CuttingProxy, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as sdk:
            request = asyncio.create_task(sdk.images.generate(prompt="a fox"))
            await until(lambda: backend.running == 1)
            for retry in (1, 2):
                proxy.cut()
                await until_sample(remote, JOINED_BY_RETRY, retry)
            assert proxy.connections == 3
            backend.open.set()
            (image,) = (await request).data or []
        assert dict(image.model_extra or {})["seed"] == backend.generations[0].seed
        assert len(backend.generations) == 1

    async def test_python_s_retry_after_a_lost_response_gets_that_response(
        self, proxy: CuttingProxy, backend: FakeBackend
    ) -> None:
        proxy.swallows_answers = True
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as sdk:
            request = asyncio.create_task(sdk.images.generate(prompt="a fox", size="512x512"))
            await until(lambda: proxy.swallowed == 1)
            proxy.swallows_answers = False
            (image,) = (await request).data or []
        assert dict(image.model_extra or {})["seed"] == backend.generations[0].seed
        assert (proxy.connections, len(backend.generations)) == (2, 1)

    async def test_python_s_retry_after_its_own_timeout_is_generated_once(
        self, gateway: str, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        attempts = list[httpx.Request]()

        async def time_out_once(request: httpx.Request) -> None:
            attempts.append(request)
            if len(attempts) == 1:
                request.extensions["timeout"]["read"] = 0.4

        backend.open.clear()
        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [time_out_once]})
        async with openai.AsyncOpenAI(base_url=f"{gateway}/v1", api_key=KEY, http_client=http) as sdk:
            request = asyncio.create_task(sdk.images.generate(prompt="a fox"))
            await until_sample(remote, JOINED_BY_RETRY, 1)
            backend.open.set()
            assert (await request).data
        assert [attempt.headers["x-stainless-retry-count"] for attempt in attempts] == ["0", "1"]
        assert len(backend.generations) == 1

    async def test_python_s_stream_is_joined_from_its_first_event(
        self, proxy: CuttingProxy, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as sdk:
            request = asyncio.create_task(sdk.images.generate(prompt="a fox", stream=True, partial_images=2))
            await until(lambda: backend.running == 1)
            proxy.cut()
            await until_sample(remote, JOINED_BY_RETRY, 1)
            backend.open.set()
            assert len([event async for event in await request]) == 3
        assert len(backend.generations) == 1

    async def test_node_s_retry_after_a_cut_connection_is_generated_once(
        self, node: Path, proxy: CuttingProxy, remote: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        backend.open.clear()
        script = run_node_client(node, f"{proxy.url}/v1", KEY, script="retries.mjs")
        request = asyncio.create_task(script)
        await until(lambda: backend.running == 1, 30)
        proxy.cut()
        await until_sample(remote, JOINED_BY_RETRY, 1)
        backend.open.set()
        seed = backend.generations[0].seed
        assert (await request)["seeds"] == [seed, seed + 1]
        assert len(backend.generations) == 1
