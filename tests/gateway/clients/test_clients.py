"""Clients, unchanged, over a real connection: OpenAI's own, Python, sync and async, and Node; Vercel's AI SDK;
the JDK's HTTP client.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai._types import FileTypes
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.backend import GenerationRequest
from support.fake_backend import FakeBackend, on_loopback, until
from support.image_files import file_of, hole, photo
from support.node_client import run_node_client

KEY = "sk-correct-horse"
GENERATIONS = "/v1/images/generations"


@pytest.fixture
async def gateway(backend: FakeBackend) -> AsyncIterator[str]:
    async with on_loopback(create_app(Config(api_key=KEY, max_queue_size=1, retry_grace=0.2), backend)) as url:
        yield url


@pytest.fixture
async def sdk(gateway: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway}/v1", api_key=KEY, max_retries=0) as sdk:
        yield sdk


class TestPython:
    async def test_it_lists_and_retrieves_the_model(self, sdk: openai.AsyncOpenAI) -> None:
        (listed,) = [model async for model in sdk.models.list()]
        assert (listed.id, listed.object, listed.owned_by) == ("acme/tiny-emoji", "model", "hypergen")
        assert abs(listed.created - time.time()) < 5
        assert (await sdk.models.retrieve(listed.id)).id == listed.id

    async def test_it_gets_images_and_their_seeds(self, sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.images.generate(prompt="a fox", model="gpt-image-1", n=2, extra_body={"seed": 7})
        assert response.data is not None
        for offset, image in enumerate(response.data):
            decoded = Image.open(io.BytesIO(base64.b64decode(image.b64_json or "")))
            assert (decoded.size, decoded.getpixel((0, 0))) == ((64, 48), (7 + offset,) * 3)
            assert image.model_extra == {"seed": 7 + offset}
        assert (response.background, response.output_format, response.quality) == ("opaque", "png", "medium")
        assert (response.size, response.usage and response.usage.total_tokens) == ("64x48", 2 + 2 * 48)

    async def test_the_blocking_client_works_too(self, gateway: str) -> None:
        with openai.OpenAI(base_url=f"{gateway}/v1", api_key=KEY) as sdk:
            response = await asyncio.to_thread(sdk.images.generate, prompt="a fox", size="512x512")
        assert response.data is not None
        assert len(response.data) == 1

    async def test_the_raw_response_has_its_id(self, sdk: openai.AsyncOpenAI) -> None:
        raw = await sdk.models.with_raw_response.list(extra_headers={"x-request-id": "mine-1"})
        assert raw.request_id == "mine-1"
        assert int(raw.headers["openai-processing-ms"]) >= 0

    async def test_a_bad_value_is_its_bad_request_error_with_param(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="each side from 1 to 4096") as raised:
            await sdk.images.generate(prompt="a fox", size="9000x7")
        assert (raised.value.param, raised.value.type) == ("size", "invalid_request_error")

    async def test_an_unknown_model_is_its_not_found_error(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as raised:
            await sdk.models.retrieve("no/such-model")
        assert raised.value.code == "model_not_found"

    async def test_a_wrong_key_is_its_authentication_error(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as raised:
            await sdk.with_options(api_key="sk-wrong").models.list()
        assert raised.value.code == "invalid_api_key"

    async def test_a_full_queue_is_its_rate_limit_error(self, sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.open.clear()
        requests = [asyncio.create_task(sdk.images.generate(prompt="a", n=4)) for _ in range(3)]
        await until(lambda: any(request.done() for request in requests))
        backend.open.set()
        results = await asyncio.gather(*requests, return_exceptions=True)
        (refused,) = [result for result in results if isinstance(result, BaseException)]
        assert isinstance(refused, openai.RateLimitError)
        assert refused.code == "rate_limit_exceeded"

    async def test_it_tries_again_by_itself_until_triton_is_back(
        self, sdk: openai.AsyncOpenAI, backend: FakeBackend
    ) -> None:
        backend.failure = UnavailableError("away", retry_after=0.2)
        request = asyncio.create_task(sdk.with_options(max_retries=2).images.generate(prompt="a"))
        await until(lambda: len(backend.generations) == 1)
        backend.failure = None
        assert (await request).data
        assert len(backend.generations) == 2


class TestPythonStreams:
    async def test_it_sees_previews_then_the_image_of_each(self, sdk: openai.AsyncOpenAI) -> None:
        stream = await sdk.images.generate(
            prompt="a fox", stream=True, partial_images=2, n=2, extra_body={"seed": 7, "output_format": "webp"}
        )
        events = [event async for event in stream]
        assert [event.type for event in events] == ["image_generation.partial_image"] * 4 + [
            "image_generation.completed"
        ] * 2
        partials = [event for event in events if isinstance(event, ImageGenPartialImageEvent)]
        completed = [event for event in events if isinstance(event, ImageGenCompletedEvent)]
        assert [event.partial_image_index for event in partials] == [0, 0, 1, 1]
        assert sorted(dict(event.model_extra or {})["seed"] for event in completed) == [7, 8]
        assert {event.usage.total_tokens for event in completed} == {2 + 48}
        assert Image.open(io.BytesIO(base64.b64decode(completed[0].b64_json))).format == "WEBP"

    async def test_heartbeats_do_not_disturb_it(self, backend: FakeBackend) -> None:
        backend.open.clear()
        app = create_app(Config(heartbeat_interval=0.02), backend)
        async with on_loopback(app) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
            stream = await sdk.images.generate(prompt="a", stream=True)
            asyncio.get_running_loop().call_later(0.2, backend.open.set)
            assert [event.type async for event in stream] == ["image_generation.completed"]

    async def test_an_error_before_the_first_event_is_that_of_its_status(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as raised:
            await sdk.images.generate(prompt="a", stream=True, size="9000x7")
        assert raised.value.param == "size"

    async def test_an_error_in_the_stream_is_raised_where_it_happens(
        self, sdk: openai.AsyncOpenAI, backend: FakeBackend
    ) -> None:
        backend.late_failure = UnavailableError("The image model went away.")
        stream = await sdk.images.generate(prompt="a", stream=True, partial_images=1)
        assert (await anext(stream)).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError, match="went away") as raised:
            await anext(stream)
        assert raised.value.code == "service_unavailable"

    async def test_closing_the_stream_stops_the_images(self, sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.finishing.clear()
        stream = await sdk.images.generate(prompt="a", stream=True, partial_images=1)
        await anext(stream)
        assert backend.running == 1
        await stream.close()
        await until(lambda: backend.running == 0, 1.0)

    async def test_links_in_a_response_open(self, sdk: openai.AsyncOpenAI) -> None:
        response = await sdk.images.generate(prompt="a", response_format="url")
        assert response.data is not None
        async with httpx.AsyncClient() as client:
            file = await client.get(response.data[0].url or "")
        assert Image.open(io.BytesIO(file.content)).size == (64, 48)


class TestPythonEdits:
    async def test_one_image_with_a_mask(self, sdk: openai.AsyncOpenAI, backend: FakeBackend, tmp_path: Path) -> None:
        file = tmp_path / "my photo.png"
        file.write_bytes(file_of(photo()))
        response = await sdk.images.edit(
            image=file, mask=file_of(hole()), prompt="a fox", n=2, extra_body={"seed": 7, "strength": 0.5}
        )
        assert response.data is not None
        assert [dict(image.model_extra or {})["seed"] for image in response.data] == [7, 8]
        (generation,) = backend.generations
        assert (generation.prompt, generation.strength, generation.mask is not None) == ("a fox", 0.5, True)

    async def test_several_images_as_bytes_open_files_and_tuples(
        self, sdk: openai.AsyncOpenAI, backend: FakeBackend
    ) -> None:
        images: list[FileTypes] = [
            file_of(photo()),
            io.BytesIO(file_of(photo(), "WEBP")),
            ("a.jpg", file_of(photo(), "JPEG"), "image/jpeg"),
        ]
        response = await sdk.images.edit(image=images, prompt="a fox", n=3)
        assert response.data is not None
        assert (len(response.data), len(backend.generations)) == (3, 3)

    async def test_a_stream_of_an_edit(self, sdk: openai.AsyncOpenAI) -> None:
        stream = await sdk.images.edit(
            image=file_of(photo()), prompt="a fox", stream=True, partial_images=1, output_format="webp"
        )
        events = [event async for event in stream]
        assert [type(event) for event in events] == [ImageEditPartialImageEvent, ImageEditCompletedEvent]

    @pytest.mark.filterwarnings("ignore:deprecated")
    async def test_variations(self, sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        response = await sdk.images.create_variation(image=file_of(photo()), n=2, response_format="b64_json")
        assert response.data is not None
        assert len(response.data) == 2
        assert backend.generations[0].image is not None

    async def test_a_wrong_mask_is_its_bad_request_error_with_param(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="size of the first image") as raised:
            await sdk.images.edit(image=file_of(photo()), mask=file_of(hole(8, 8, (0, 0, 4, 4))), prompt="a fox")
        assert raised.value.param == "mask"


class TestDepartures:
    async def test_a_client_that_hangs_up_stops_its_images(self, sdk: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.open.clear()
        request = asyncio.create_task(sdk.images.generate(prompt="a"))
        await until(lambda: backend.running == 1)
        request.cancel()
        await until(lambda: backend.running == 0, 1.0)

    async def test_a_client_that_hangs_up_while_waiting_leaves_the_queue(
        self, sdk: openai.AsyncOpenAI, backend: FakeBackend, gateway: str
    ) -> None:
        async def queue_size() -> int:
            async with httpx.AsyncClient() as client:
                return int((await client.get(f"{gateway}/health")).json()["queue_size"])

        async def until_queue_size(wanted: int) -> None:
            while await queue_size() != wanted:
                await asyncio.sleep(0.01)

        backend.open.clear()
        working = asyncio.create_task(sdk.images.generate(prompt="a", n=4))
        await until(lambda: backend.running == 1)
        waiting = asyncio.create_task(sdk.images.generate(prompt="b", n=4))
        await asyncio.wait_for(until_queue_size(1), 2)
        waiting.cancel()
        await asyncio.wait_for(until_queue_size(0), 2)
        backend.open.set()
        assert (await working).data
        assert [generation.prompt for generation in backend.generations] == ["a"]


class TestHttp:
    async def test_the_event_loop_answers_while_large_images_are_encoded(
        self, sdk: openai.AsyncOpenAI, gateway: str
    ) -> None:
        request = asyncio.create_task(sdk.images.generate(prompt="a", n=4, size="1536x1536"))
        longest = 0.0
        async with httpx.AsyncClient() as client:
            while not request.done():
                began = time.perf_counter()
                await client.get(f"{gateway}/health/live")
                longest = max(longest, time.perf_counter() - began)
        assert (await request).data
        assert longest < 1.0

    @pytest.mark.parametrize("declared", [True, False])
    async def test_a_huge_body_is_refused_and_the_client_reads_why(self, gateway: str, declared: bool) -> None:
        async def endless() -> AsyncIterator[bytes]:
            for _ in range(4096):
                yield b" " * 65536

        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        if declared:
            headers["Content-Length"] = str(4096 * 65536)
        async with httpx.AsyncClient(base_url=gateway) as client:
            response = await client.post(GENERATIONS, content=endless(), headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert int(response.headers["openai-processing-ms"]) < 1000

    async def test_head_has_no_body(self, gateway: str) -> None:
        async with httpx.AsyncClient(base_url=gateway) as client:
            response = await client.head("/health")
        assert (response.status_code, response.content) == (200, b"")

    @pytest.mark.parametrize("path", ["/v1/models/acme%2Ftiny-emoji", "/v1/models/acme/tiny-emoji"])
    async def test_an_id_is_found_escaped_or_not(self, gateway: str, path: str) -> None:
        async with httpx.AsyncClient(base_url=gateway) as client:
            response = await client.get(path, headers={"Authorization": f"Bearer {KEY}"})
        assert response.json()["id"] == "acme/tiny-emoji"


class TestNode:
    async def test_it_lists_retrieves_generates_and_understands_errors(self, node: Path, gateway: str) -> None:
        seen = await run_node_client(node, f"{gateway}/v1", KEY, "acme/tiny-emoji")
        assert [model["id"] for model in seen["models"]] == ["acme/tiny-emoji"]
        assert seen["retrieved"]["owned_by"] == "hypergen"
        assert [image["seed"] for image in seen["images"]["data"]] == [7, 8]
        image = Image.open(io.BytesIO(base64.b64decode(seen["images"]["data"][0]["b64_json"])))
        assert image.size == (64, 48)
        assert (seen["unknownModel"]["name"], seen["unknownModel"]["code"]) == ("NotFoundError", "model_not_found")
        assert (seen["wrongSize"]["name"], seen["wrongSize"]["param"]) == ("BadRequestError", "size")
        assert (seen["wrongKey"]["name"], seen["wrongKey"]["code"]) == ("AuthenticationError", "invalid_api_key")
        assert [event["type"] for event in seen["streamed"]] == [
            "image_generation.partial_image",
            "image_generation.partial_image",
            "image_generation.completed",
        ]
        assert seen["streamed"][-1]["seed"] == 9
        assert [image["seed"] for image in seen["edited"]["data"]] == [3]
        assert [event["type"] for event in seen["editStreamed"]] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]
        assert len(seen["varied"]["data"]) == 2
        assert (seen["wrongMask"]["name"], seen["wrongMask"]["param"]) == ("BadRequestError", "mask")
        assert seen["link"]["bytes"] > 20  # a flat WebP has some fifty
        assert seen["link"]["type"] == "image/webp"
        assert all(seen[error]["requestID"] for error in ("unknownModel", "wrongSize", "wrongKey"))


class TestAiSdk:
    """It has no streams of images, and reads nothing of an answer but the images."""

    @pytest.fixture
    async def seen(self, node: Path, gateway: str) -> dict[str, Any]:
        return await run_node_client(node, f"{gateway}/v1", KEY, mask=file_of(hole()), script="ai-sdk.mjs")

    async def test_it_generates_edits_and_understands_errors(self, seen: dict[str, Any], backend: FakeBackend) -> None:
        assert [(file.format, file.size, file.getpixel((0, 0))) for file in files_in(seen["generated"])] == [
            ("PNG", (64, 48), (7, 7, 7)),
            ("PNG", (64, 48), (8, 8, 8)),
        ]
        assert (seen["generated"]["warnings"], bool(seen["generated"]["requestID"])) == ([], True)
        assert [warning["feature"] for warning in seen["webp"]["warnings"]] == ["seed"]
        assert (seen["webp"]["images"][0]["mediaType"], files_in(seen["webp"])[0].format) == ("image/webp", "WEBP")
        assert [len(files_in(seen[edit])) for edit in ("edited", "editedFromSeveral", "repainted")] == [1, 2, 1]
        generated, _, edited, *several, repainted = backend.generations
        assert (generated.num_images, generated.num_inference_steps) == (2, 4)
        assert (start_of(edited), start_of(repainted)) == (7, 7)
        assert sorted((start_of(edit), edit.strength) for edit in several) == [(7, 0.5), (8, 0.5)]
        assert (edited.mask is None, repainted.mask is not None) == (True, True)

        def error(name: str) -> tuple[Any, ...]:
            return tuple(seen[name][key] for key in ("statusCode", "param", "code", "isRetryable"))

        assert error("wrongSize") == (400, "size", None, False)
        assert error("wrongMask") == (400, "mask", None, False)
        assert error("wrongKey") == (401, None, "invalid_api_key", False)
        assert "each side from 1 to 4096" in seen["wrongSize"]["message"]


def start_of(edit: GenerationRequest) -> int:
    """The grey of the image that it starts from."""
    assert edit.image is not None
    return int(edit.image.max())


def files_in(answer: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(image["base64"]))) for image in answer["images"]]


class TestJdk:
    @pytest.mark.java
    async def test_its_client_that_asks_for_http_2_first_gets_images(self, gateway: str, backend: FakeBackend) -> None:
        source = Path(__file__).parent / "java" / "Generate.java"
        java = await asyncio.create_subprocess_exec(
            "java", "-Dfile.encoding=UTF-8", str(source), f"{gateway}/v1", KEY, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(java.communicate(), 60)
        answers = [line.split(" ", 2) for line in out.decode().splitlines()]
        assert [answer[:2] for answer in answers] == [["200", "HTTP_1_1"]] * 2
        images = [
            Image.open(io.BytesIO(base64.b64decode(json.loads(body)["data"][0]["b64_json"]))) for _, _, body in answers
        ]
        assert [(image.size, image.getpixel((0, 0))) for image in images] == [((64, 48), (7, 7, 7))] * 2
        assert [generation.prompt for generation in backend.generations] == ["a fox", "a café in the rain"]
