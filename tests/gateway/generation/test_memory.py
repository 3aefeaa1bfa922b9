"""Images that requests start from: they leave memory with the answer, without waiting for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.image_inputs import InitImage
from hypergen_gateway.generation.request import SubRequest
from support.fake_backend import FakeBackend, in_memory, on_loopback, until, until_sample
from support.image_files import file_of, photo

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
KEYED = {"Idempotency-Key": "a"}
AWAY, FAULT = UnavailableError("away"), ValueError("a fault")


Images = list[InitImage | SubRequest]


def young_images() -> Images:
    # By type: isinstance would ask objects of other packages for their class, and some of them warn.
    found = [each for each in gc.get_objects(generation=0) if issubclass(type(each), InitImage | SubRequest)]
    return [each for each in found if isinstance(each, InitImage) or each.generation.image is not None]


@pytest.fixture
def images_in_memory(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], Images]]:
    """Those that have come since the test began, while the garbage collector is off."""
    caplog.set_level("CRITICAL")  # a record of an error keeps its traceback
    gc.disable()
    gc.collect(0)  # whatever is young from now on has come since
    yield young_images
    gc.enable()


@pytest.mark.parametrize(
    ("status", "settings", "fields", "headers", "failure"),
    [
        (200, {}, {}, {}, None),
        (200, {"retry_bytes": 100}, {}, KEYED, None),
        (200, {}, {"stream": "true", "partial_images": "1"}, {}, None),
        (400, {}, {"num_inference_steps": "1000"}, {}, None),
        (400, {}, {}, {"Idempotency-Key": " "}, None),
        (500, {}, {}, {}, FAULT),
        (500, {}, {"n": "2"}, {}, FAULT),
        (500, {}, {"stream": "true"}, {}, FAULT),
        (503, {}, {}, {}, AWAY),
        (503, {"retry_bytes": 100}, {}, KEYED, AWAY),
    ],
)
async def test_they_are_gone_when_the_request_is_answered(
    backend: FakeBackend,
    status: int,
    settings: dict[str, Any],
    fields: dict[str, str],
    headers: dict[str, str],
    failure: Exception | None,
    images_in_memory: Callable[[], Images],
) -> None:
    backend.failure = failure
    async with in_memory(create_app(Config(**settings), backend), timeout=60) as client:
        files = [("image", file_of(photo()))] * 2
        response = await client.post(EDITS, data={"prompt": "a fox", **fields}, files=files, headers=headers)
        assert response.status_code == status
        await until(lambda: not images_in_memory())


async def test_they_are_gone_when_the_queue_is_full(
    backend: FakeBackend, images_in_memory: Callable[[], Images]
) -> None:
    backend.open.clear()
    async with in_memory(create_app(Config(max_queue_size=0), backend), timeout=60) as client:
        working = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "a fox", "n": 4}))
        await until(lambda: backend.running == 1)
        refused = await client.post(EDITS, data={"prompt": "a fox"}, files={"image": file_of(photo())})
        assert refused.status_code == 429
        await until(lambda: not images_in_memory())
        backend.open.set()
        await working


async def test_they_are_gone_when_the_time_is_up(backend: FakeBackend, images_in_memory: Callable[[], Images]) -> None:
    backend.open.clear()
    async with in_memory(create_app(Config(request_timeout=0.1), backend), timeout=60) as client:
        late = await client.post(EDITS, data={"prompt": "a fox"}, files={"image": file_of(photo())})
        assert late.status_code == 504
        await until(lambda: not images_in_memory())


async def test_they_are_gone_when_the_client_is(backend: FakeBackend, images_in_memory: Callable[[], Images]) -> None:
    backend.open.clear()
    app = create_app(Config(), backend)
    async with on_loopback(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        edit = client.post(EDITS, data={"prompt": "a fox"}, files={"image": file_of(photo())})
        leaving = asyncio.create_task(edit)
        await until(lambda: backend.running == 1)
        leaving.cancel()
        await until(lambda: not images_in_memory())


async def test_they_are_gone_when_work_fails_whose_client_is_gone(
    backend: FakeBackend, images_in_memory: Callable[[], Images]
) -> None:
    backend.open.clear()
    app = create_app(Config(retry_bytes=100), backend)
    async with on_loopback(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        edit = client.post(EDITS, data={"prompt": "a fox"}, files={"image": file_of(photo())}, headers=KEYED)
        leaving = asyncio.create_task(edit)
        await until(lambda: backend.running == 1)
        leaving.cancel()
        await until_sample(client, 'requests_total{method="POST",route="/v1/images/edits",status="499"}', 1)
        backend.failure = AWAY
        backend.open.set()
        await until(lambda: not images_in_memory())
