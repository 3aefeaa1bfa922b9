"""The backend that is Triton, against the real gRPC of a fake server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import fields, replace
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import (
    DeadlineExceededError,
    HyperGenError,
    InternalError,
    InvalidRequestError,
    NonFiniteImageError,
    QueueFullError,
    UnavailableError,
)
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest, Lora, ModelDescription, Timings
from hypergen_gateway.http.request_id import current_request_id
from hypergen_gateway.triton.client import INPUT_TYPES, TritonBackend
from support.fake_backend import in_memory, until
from support.fake_triton import PARAMETERS, FakeTriton, serving, tensors_of

FOX = GenerationRequest(
    prompt="a fox 🦊", width=64, height=48, num_inference_steps=20, guidance_scale=5.5, seed=2**63 - 10, num_images=3
)
FULL = GenerationRequest(
    prompt="a fox",
    negative_prompt="blurry",
    num_images=1,
    width=64,
    height=48,
    num_inference_steps=20,
    guidance_scale=5.5,
    guidance_start=0.25,
    guidance_end=0.75,
    cache_interval=3,
    scheduler="euler",
    timestep_spacing="trailing",
    sigmas="karras",
    eta=0.5,
    guidance_rescale=0.75,
    skip_layer_guidance_scale=2.5,
    skip_layer_guidance_start=0.0,
    skip_layer_guidance_stop=0.5,
    prompt_weighting="a1111",
    clip_skip=2,
    seed=7,
    lora=("ink", "clay"),
    lora_scale=(0.5, -1.0),
)


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
async def url(triton: FakeTriton) -> AsyncIterator[str]:
    async with serving(triton) as url:
        yield url


@pytest.fixture
async def backend(url: str) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(url, request_timeout=5, call_timeout=0.5)
    yield backend
    await backend.close()


@asynccontextmanager
async def backend_of(*urls: str) -> AsyncIterator[TritonBackend]:
    """One backend before several Tritons."""
    backend = TritonBackend(f"ipv4:{','.join(urls)}", request_timeout=5, call_timeout=0.5)
    yield backend
    await backend.close()


async def all_reached(backend: TritonBackend, tritons: list[FakeTriton]) -> None:
    """Generate until each has been asked once, since connections are made one after the other; then forget it."""
    while not all(triton.requests for triton in tritons):
        await generate(backend)
    for triton in tritons:
        triton.requests.clear()


async def generate(backend: TritonBackend, generation: GenerationRequest = FOX) -> list[GeneratedImage]:
    async with aclosing(backend.generate(generation)) as stream:
        return [image async for image in stream]


class TestDescribe:
    async def test_the_parameters_become_the_description(self, backend: TritonBackend) -> None:
        assert await backend.describe() == ModelDescription(
            model_id="acme/tiny-emoji",
            export_key="k1",
            engine="openvino",
            dtype="bfloat16",
            device="cuda:0",
            components=("text_encoder", "unet", "vae_decoder"),
            schedulers=("ddim", "euler"),
            default_width=64,
            default_height=48,
            size_factor=8,
            min_size=32,
            max_size=512,
            sizes=(),
            loras=(Lora(name="ink", scale=0.5, is_merged=True),),
            default_num_inference_steps=20,
            default_guidance_scale=5.5,
            max_prompt_tokens=75,
            max_num_images=10,
            max_num_inference_steps=150,
            min_guidance_scale=1.0,
            max_guidance_scale=20.0,
            default_image_guidance_scale=0.0,
            max_image_guidance_scale=0.0,
            guidance="classifier_free",
            max_cache_interval=10,
            prompt_weightings=("none", "a1111"),
            default_prompt_weighting="none",
            embeddings=(),
            max_clip_skip=12,
            default_clip_skip=0,
            max_skip_layer_guidance_scale=10.0,
            default_skip_layer_guidance_scale=0.0,
            max_active_images=32,
            max_references=4,
            masked_image_yields=0,
            max_reference_pixels=1048576,
            max_reference_side=4096,
            preferred_reference_sizes=("672x1568", "1024x1024"),
            base_model="Stable Diffusion 1.x",
            suggestions=("a rocket, red", "a cat"),
            passport=(),
        )

    async def test_every_field_is_a_parameter_of_the_same_name(self) -> None:
        assert {field.name for field in fields(ModelDescription)} <= PARAMETERS.keys()

    @pytest.mark.parametrize(
        ("name", "value"), [("max_size", None), ("max_size", "many"), ("loras", "ink"), ("loras", "[7]")]
    )
    async def test_a_missing_or_unreadable_parameter_is_named_in_the_log_s_detail(
        self, triton: FakeTriton, backend: TritonBackend, name: str, value: str | None
    ) -> None:
        del triton.parameters[name]
        if value is not None:
            triton.parameters[name] = value
        with pytest.raises(InternalError, match=name):
            await backend.describe()

    async def test_it_is_read_once(self, triton: FakeTriton, backend: TritonBackend) -> None:
        await backend.describe()
        triton.parameters["model_id"] = "another"
        assert (await backend.describe()).model_id == "acme/tiny-emoji"

    async def test_it_is_known_while_triton_is_away_and_read_again_when_it_is_back(self, triton: FakeTriton) -> None:
        async with serving(triton) as url:
            backend = TritonBackend(url, call_timeout=0.5)
            await backend.describe()
        assert not await backend.ready()
        assert (await backend.describe()).model_id == "acme/tiny-emoji"
        triton.parameters["model_id"] = "another"
        async with serving(triton, port=int(url.rpartition(":")[2])):
            began = time.perf_counter()
            while not await backend.ready():
                await asyncio.sleep(0.05)
            assert time.perf_counter() - began < 3
            assert (await backend.describe()).model_id == "another"
            await backend.close()

    @pytest.mark.parametrize("hangs", [True, False])
    async def test_without_triton_it_is_unavailable_and_soon(
        self, triton: FakeTriton, backend: TritonBackend, hangs: bool
    ) -> None:
        triton.hangs = hangs
        triton.failure = (grpc.StatusCode.UNAVAILABLE, "Server not ready")
        began = time.perf_counter()
        with pytest.raises(UnavailableError):
            await backend.describe()
        assert time.perf_counter() - began < 2


class TestReady:
    async def test_it_is_when_the_server_and_all_models_are(self, backend: TritonBackend) -> None:
        assert await backend.ready()

    @pytest.mark.parametrize("model", ["diffusion", "text_encoder", "unet", "vae_decoder"])
    async def test_it_is_not_without_any_one_model(
        self, triton: FakeTriton, backend: TritonBackend, model: str
    ) -> None:
        triton.unready_models = {model}
        assert not await backend.ready()

    async def test_it_is_not_without_a_model_that_only_this_checkpoint_has(
        self, triton: FakeTriton, backend: TritonBackend
    ) -> None:
        triton.parameters["components"] = "text_encoder,text_encoder_2,unet,vae_decoder"
        triton.unready_models = {"text_encoder_2"}
        assert not await backend.ready()

    async def test_it_is_not_when_the_server_says_so_fails_or_hangs(
        self, triton: FakeTriton, backend: TritonBackend
    ) -> None:
        triton.server_is_ready = False
        assert not await backend.ready()
        triton.failure = (grpc.StatusCode.INTERNAL, "boom")
        assert not await backend.ready()
        triton.hangs = True
        began = time.perf_counter()
        assert not await backend.ready()
        assert time.perf_counter() - began < 2

    async def test_it_is_not_where_nobody_listens(self) -> None:
        backend = TritonBackend("127.0.0.1:1", call_timeout=0.5)
        assert not await backend.ready()
        await backend.close()


class TestGenerate:
    async def test_every_field_travels_as_the_tensor_of_its_name(
        self, triton: FakeTriton, backend: TritonBackend
    ) -> None:
        await generate(backend, FULL)
        (request,) = triton.requests
        assert request.model_name == "diffusion"
        assert tensors_of(request) == sent_of(FULL)

    async def test_images_travel_in_their_shapes(self, triton: FakeTriton, backend: TritonBackend) -> None:
        image = np.arange(48 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3)
        # Not contiguous, as what is cut out of a larger image.
        await generate(backend, replace(FULL, image=image[:, ::-1], mask=image[:, :, 1], strength=0.25))
        sent = tensors_of(triton.requests[0])
        assert np.array_equal(sent["image"], image[:, ::-1])
        assert np.array_equal(sent["mask"], image[:, :, 1])
        assert sent["strength"] == 0.25

    async def test_an_absent_field_is_not_sent(self, triton: FakeTriton, backend: TritonBackend) -> None:
        await generate(backend)
        sent = tensors_of(triton.requests[0])
        assert sent == sent_of(FOX)

    async def test_images_come_back_with_pixels_index_and_seed(self, backend: TritonBackend) -> None:
        for index, image in enumerate(await generate(backend)):
            assert (image.index, image.seed) == (index, FOX.seed + index)
            assert image.pixels.shape == (48, 64, 3)
            assert np.all(image.pixels == image.seed % 256)

    async def test_an_image_tells_of_its_steps_tokens_and_times(self, backend: TritonBackend) -> None:
        (image,) = await generate(backend, FULL)
        assert (image.step, image.is_final) == (20, True)
        assert (image.prompt_tokens, image.truncated_tokens) == (2, 3)
        assert image.timings == Timings(queue=1, encode_text=2, denoise=30, decode=4)

    async def test_a_sampler_that_does_not_say_what_it_cut_off_is_one_that_cut_off_nothing(
        self, triton: FakeTriton, backend: TritonBackend
    ) -> None:
        triton.left_out_outputs = {"truncated_tokens"}
        (image,) = await generate(backend, FULL)
        assert image.truncated_tokens == 0

    async def test_previews_come_before_their_image(self, backend: TritonBackend) -> None:
        came = await generate(backend, replace(FOX, num_images=2, partial_images=2))
        assert [(image.index, image.step, image.is_final) for image in came] == [
            *((0, 1, False), (0, 2, False), (0, 20, True)),
            *((1, 1, False), (1, 2, False), (1, 20, True)),
        ]

    async def test_a_large_image_passes(self, backend: TritonBackend) -> None:
        large = replace(FULL, width=2048, height=2048)
        assert (await generate(backend, large))[0].pixels.nbytes == 2048 * 2048 * 3

    async def test_triton_learns_the_request_s_id_and_is_asked_for_real_error_codes(
        self, triton: FakeTriton, backend: TritonBackend
    ) -> None:
        token = current_request_id.set("req_1")
        await generate(backend)
        current_request_id.reset(token)
        assert triton.requests[0].id == "req_1"
        assert triton.headers[0]["triton_grpc_error"] == "true"

    async def test_a_consumer_that_stops_stops_the_stream(self, triton: FakeTriton, backend: TritonBackend) -> None:
        triton.hangs, triton.images_before_trouble = True, 1
        async with aclosing(backend.generate(FOX)) as stream:
            async for _ in stream:
                break
        await until(lambda: triton.cancelled_streams == 1)

    async def test_a_cancelled_task_stops_the_stream(self, triton: FakeTriton, backend: TritonBackend) -> None:
        triton.hangs = True
        task = asyncio.create_task(generate(backend))
        await until(lambda: len(triton.requests) == 1)
        task.cancel()
        await until(lambda: triton.cancelled_streams == 1)
        assert task.cancelled()

    async def test_a_stream_that_hangs_ends_at_the_request_timeout(self, triton: FakeTriton, url: str) -> None:
        triton.hangs = True
        backend = TritonBackend(url, request_timeout=0.2)
        with pytest.raises(DeadlineExceededError):
            await generate(backend)
        await until(lambda: triton.cancelled_streams == 1)
        await backend.close()

    async def test_a_triton_that_dies_in_the_middle_is_unavailable(self, triton: FakeTriton) -> None:
        triton.hangs, triton.images_before_trouble = True, 1
        async with serving(triton) as url:
            backend = TritonBackend(url)
            task = asyncio.create_task(generate(backend))
            await until(lambda: len(triton.requests) == 1)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(task, 5)
        await backend.close()

    async def test_many_streams_share_the_connection(self, backend: TritonBackend) -> None:
        results = await asyncio.gather(*(generate(backend, replace(FOX, seed=seed)) for seed in range(20)))
        assert [[image.seed for image in result] for result in results] == [
            [seed, seed + 1, seed + 2] for seed in range(20)
        ]

    async def test_several_tritons_share_the_streams(self) -> None:
        tritons = [FakeTriton(), FakeTriton()]
        async with serving(tritons[0]) as first, serving(tritons[1]) as second, backend_of(first, second) as backend:
            await all_reached(backend, tritons)
            for _ in range(10):
                assert len(await generate(backend)) == 3
        shares = [len(triton.requests) for triton in tritons]
        assert abs(shares[0] - shares[1]) <= 1

    async def test_no_request_is_lost_with_one_of_several_tritons(self) -> None:
        tritons = [FakeTriton(), FakeTriton()]
        async with serving(tritons[0]) as first, AsyncExitStack() as going:
            second = await going.enter_async_context(serving(tritons[1]))
            async with backend_of(first, second) as backend:
                await all_reached(backend, tritons)
                for triton in tritons:
                    triton.images_before_trouble = 1
                tritons[1].hangs = True
                tasks = [asyncio.create_task(generate(backend, replace(FOX, seed=seed))) for seed in range(8)]
                await until(lambda: len(tritons[1].requests) > 0 and len(tritons[0].requests) > 0)
                await going.aclose()
                results = await asyncio.wait_for(asyncio.gather(*tasks), 10)
                assert len(await generate(backend)) == 3
        assert [[image.seed for image in result] for result in results] == [
            [seed, seed + 1, seed + 2] for seed in range(8)
        ]

    async def test_what_has_come_is_not_repeated_when_the_rest_is_asked_for_again(self, triton: FakeTriton) -> None:
        generation = replace(FOX, num_images=2, partial_images=3)
        triton.hangs, triton.images_before_trouble, triton.trouble_follows_previews = True, 1, True
        async with serving(triton) as url:
            backend = TritonBackend(url, request_timeout=5)
            stream = backend.generate(generation)
            came = [await anext(stream) for _ in range(7)]
        triton.hangs = False
        async with serving(triton, port=int(url.rpartition(":")[2])), aclosing(stream):
            came += [image async for image in stream]
        await backend.close()
        assert [(image.index, image.step) for image in came] == [
            *((0, 1), (0, 2), (0, 3), (0, 20)),
            *((1, 1), (1, 2), (1, 3), (1, 20)),
        ]

    async def test_a_triton_that_is_expected_back_is_waited_for(self, triton: FakeTriton) -> None:
        triton.hangs, triton.images_before_trouble = True, 1
        async with serving(triton) as url:
            backend = TritonBackend(url, request_timeout=10, retry_seconds=5)
            stream = backend.generate(replace(FOX, num_images=2))
            came = [await anext(stream)]
        coming = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(1.0)  # several tries at a port on which nobody listens
        assert not coming.done()
        triton.hangs = False
        async with serving(triton, port=int(url.rpartition(":")[2])), aclosing(stream):
            came += [await coming, *[image async for image in stream]]
        await backend.close()
        assert [image.index for image in came] == [0, 1]
        assert len(triton.requests) == 2

    async def test_a_triton_that_stays_away_is_waited_for_no_longer_than_expected(self, triton: FakeTriton) -> None:
        async with serving(triton) as url:
            backend = TritonBackend(url, request_timeout=10, retry_seconds=0.6)
            await generate(backend)
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            await generate(backend)
        assert 0.6 <= time.monotonic() - began < 3
        await backend.close()

    async def test_a_closed_backend_opens_again(self, backend: TritonBackend) -> None:
        await generate(backend)
        await backend.close()
        await backend.close()
        assert len(await generate(backend)) == 3

    async def test_closing_under_a_running_stream_ends_it(self, triton: FakeTriton, backend: TritonBackend) -> None:
        triton.hangs = True
        task = asyncio.create_task(generate(backend))
        await until(lambda: len(triton.requests) == 1)
        await backend.close()
        with pytest.raises((UnavailableError, asyncio.CancelledError)):
            await asyncio.wait_for(task, 5)


def sent_of(generation: GenerationRequest) -> dict[str, Any]:
    """What must travel: every field that holds something and that the sampler takes."""
    given = {name: value for name, value in vars(generation).items() if name in INPUT_TYPES}
    return {
        name: value
        for name, value in given.items()
        if value is not None and not (isinstance(value, tuple) and value == ())
    }


CODE = grpc.StatusCode
# what Triton says, what it means here, and the parameter that it is about
TRANSLATIONS: list[tuple[grpc.StatusCode, str, type[HyperGenError], str | None]] = [
    (CODE.INVALID_ARGUMENT, "width: 7 is not a multiple of 8", InvalidRequestError, "size"),
    (CODE.INVALID_ARGUMENT, "height: 7 is not a multiple of 8", InvalidRequestError, "size"),
    (CODE.INVALID_ARGUMENT, "num_images: 99; 1 to 10", InvalidRequestError, "n"),
    (CODE.INVALID_ARGUMENT, "num_inference_steps: 0; 1 to 150", InvalidRequestError, "num_inference_steps"),
    (CODE.INVALID_ARGUMENT, "guidance_scale: nan", InvalidRequestError, "guidance_scale"),
    (CODE.INVALID_ARGUMENT, "guidance_end: must be absent", InvalidRequestError, "guidance_end"),
    (CODE.INVALID_ARGUMENT, "scheduler: 'x' is not\none of ddim", InvalidRequestError, "scheduler"),
    (CODE.INVALID_ARGUMENT, "prompt: empty", InvalidRequestError, "prompt"),
    (CODE.INVALID_ARGUMENT, "image: must be [48, 64, 3], not [1, 1, 3]", InvalidRequestError, "image"),
    (CODE.INVALID_ARGUMENT, "mask: needs an image", InvalidRequestError, "mask"),
    (CODE.INVALID_ARGUMENT, "strength: leaves no step", InvalidRequestError, "strength"),
    (CODE.INVALID_ARGUMENT, "lora: must be one of ink", InvalidRequestError, "lora_path"),
    (CODE.INVALID_ARGUMENT, "lora_scale: must be 0, 0.5", InvalidRequestError, "lora_scale"),
    (CODE.INVALID_ARGUMENT, "partial_images: must be from 0 to 3", InvalidRequestError, "partial_images"),
    (CODE.INVALID_ARGUMENT, "unexpected inference input 'mask' for model 'diffusion'", InternalError, None),
    (CODE.INVALID_ARGUMENT, "unet: got a wrong shape", InternalError, None),
    (CODE.UNAVAILABLE, "queue full: 256 images wait", QueueFullError, None),
    (CODE.UNAVAILABLE, "Server not ready", UnavailableError, None),
    (CODE.NOT_FOUND, "Request for unknown model: 'diffusion' is not found", UnavailableError, None),
    (CODE.CANCELLED, "cancelled", UnavailableError, None),
    (CODE.INTERNAL, "Stub process 'diffusion_0_0' is not healthy.", UnavailableError, None),
    (CODE.INTERNAL, "not finite: the latents after step 3 of 6", NonFiniteImageError, None),
    (CODE.DEADLINE_EXCEEDED, "too slow", DeadlineExceededError, None),
    (CODE.INTERNAL, "Traceback: /srv/secret.py", InternalError, None),
    (CODE.UNKNOWN, "Stub process 'diffusion_0_0' is not healthy.", UnavailableError, None),
    (CODE.UNIMPLEMENTED, "decoupled", InternalError, None),
    (CODE.RESOURCE_EXHAUSTED, "message too large", InternalError, None),
]


class TestGate:
    @pytest.mark.parametrize(("code", "message", "ours", "param"), TRANSLATIONS)
    async def test_each_foreign_error_becomes_one_of_ours_and_stays_its_cause(
        self,
        triton: FakeTriton,
        backend: TritonBackend,
        code: grpc.StatusCode,
        message: str,
        ours: type[HyperGenError],
        param: str | None,
    ) -> None:
        triton.failure = (code, message)
        with pytest.raises(HyperGenError) as raised:
            await generate(backend)
        assert type(raised.value) is ours
        assert raised.value.param == param
        assert isinstance(raised.value.__cause__, grpc.aio.AioRpcError)
        assert "secret" not in raised.value.message

    async def test_an_error_after_the_first_image_is_translated_too(
        self, triton: FakeTriton, backend: TritonBackend
    ) -> None:
        triton.failure, triton.images_before_trouble = (CODE.UNAVAILABLE, "Server not ready"), 1
        stream = backend.generate(FOX)
        assert (await anext(stream)).index == 0
        with pytest.raises(UnavailableError):
            await anext(stream)

    async def test_an_error_inside_the_stream_is_internal(self, triton: FakeTriton, backend: TritonBackend) -> None:
        triton.in_band_error = "something broke"
        with pytest.raises(InternalError, match="something broke"):
            await generate(backend)

    async def test_a_response_without_an_output_is_internal(self, triton: FakeTriton, backend: TritonBackend) -> None:
        triton.left_out_outputs = {"image_index"}
        with pytest.raises(InternalError, match="image_index"):
            await generate(backend)


class TestBehindTheGateway:
    """The whole gateway on the fake Triton."""

    @pytest.fixture
    async def client(self, backend: TritonBackend) -> AsyncIterator[httpx.AsyncClient]:
        async with in_memory(create_app(Config(), backend)) as client:
            yield client

    async def test_a_prompt_becomes_an_image(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/v1/images/generations", json={"prompt": "a fox", "n": 2, "seed": 5})
        assert response.status_code == 200
        assert [image["seed"] for image in response.json()["data"]] == [5, 6]

    async def test_an_image_that_is_not_finite_is_an_error_that_says_so_and_is_not_tried_again(
        self, triton: FakeTriton, client: httpx.AsyncClient
    ) -> None:
        await client.get("/v1/models")
        triton.failure = (CODE.INTERNAL, "not finite: the latents after step 3 of 6")
        response = await client.post("/v1/images/generations", json={"prompt": "a fox"})
        assert response.status_code == 500
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "image_not_finite")
        assert error["message"].startswith("The model computed values that are not finite")

    @pytest.mark.parametrize(
        ("failure", "status"),
        [
            ((CODE.INVALID_ARGUMENT, "width: too wide"), 400),
            ((CODE.UNAVAILABLE, "queue full"), 429),
            ((CODE.UNAVAILABLE, "Server not ready"), 503),
            ((CODE.DEADLINE_EXCEEDED, "late"), 504),
            ((CODE.INTERNAL, "Traceback: /srv/secret.py"), 500),
        ],
    )
    async def test_triton_s_errors_become_statuses_and_leak_nothing(
        self, triton: FakeTriton, client: httpx.AsyncClient, failure: tuple[grpc.StatusCode, str], status: int
    ) -> None:
        await client.get("/v1/models")
        triton.failure = failure
        response = await client.post("/v1/images/generations", json={"prompt": "a fox"})
        assert response.status_code == status
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))

    async def test_models_and_health_answer_when_triton_has_gone(
        self, triton: FakeTriton, client: httpx.AsyncClient
    ) -> None:
        await client.get("/v1/models")
        triton.hangs = True
        assert (await client.get("/v1/models")).status_code == 200
        health = (await client.get("/health")).json()
        assert (health["status"], health["model"], health["device"]) == ("unhealthy", "acme/tiny-emoji", "cuda:0")
