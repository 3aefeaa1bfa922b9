"""A fake generation backend, and clients of the gateway in memory and over loopback."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import uvicorn
from starlette.applications import Starlette

from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest, ModelDescription, Timings
from hypergen_gateway.http.protocol import Listener, make_uvicorn_config
from support.running_server import samples_of

MODEL = ModelDescription(
    model_id="acme/tiny-emoji",
    export_key="k1",
    engine="openvino",
    dtype="bfloat16",
    device="cpu",
    components=("text_encoder", "unet", "vae_decoder"),
    schedulers=("ddim", "euler", "euler_a"),
    default_width=64,
    default_height=48,
    size_factor=8,
    min_size=32,
    max_size=1536,
    sizes=(),
    loras=(),
    default_num_inference_steps=20,
    default_guidance_scale=5.0,
    max_prompt_tokens=75,
    max_num_images=10,
    max_num_inference_steps=150,
    min_guidance_scale=1.0,
    max_guidance_scale=20.0,
    guidance="classifier_free",
    default_image_guidance_scale=0.0,
    max_image_guidance_scale=0.0,
    max_cache_interval=1,
    prompt_weightings=("none",),
    default_prompt_weighting="none",
    embeddings=(),
    max_clip_skip=0,
    default_clip_skip=0,
    max_skip_layer_guidance_scale=0.0,
    default_skip_layer_guidance_scale=0.0,
    max_active_images=4,
    max_references=0,
    masked_image_yields=0,
    max_reference_pixels=0,
    max_reference_side=4096,
    preferred_reference_sizes=(),
    base_model="",
    suggestions=(),
    passport=(),
)


class FakeBackend:
    """A backend whose images are one flat grey, by their seed; a test sets what goes wrong."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock  # by which it says how long a picture took
        self.description: ModelDescription | HyperGenError = MODEL
        self.is_ready = True
        self.rejected_loras: Mapping[str, str] = {}
        self.failure: Exception | None = None
        self.missing_images = 0
        self.open = asyncio.Event()  # while clear, no image is finished
        self.open.set()
        self.finishing = asyncio.Event()  # while clear, previews come and images do not
        self.finishing.set()
        self.late_failure: Exception | None = None  # raised after the previews
        self.answering = asyncio.Event()  # while clear, describe() and ready() hang
        self.answering.set()
        self.truncated_tokens = 0
        self.generations: list[GenerationRequest] = []
        self.running = 0
        self.most_running_images = 0
        self._running_images = 0
        self.closed = False

    async def describe(self) -> ModelDescription:
        await self.answering.wait()
        if isinstance(self.description, HyperGenError):
            raise self.description
        return self.description

    async def ready(self) -> bool:
        await self.answering.wait()
        return self.is_ready

    async def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        self.generations.append(generation)
        self.running += 1
        self._running_images += generation.num_images
        began = self._clock()
        self.most_running_images = max(self.most_running_images, self._running_images)
        try:
            await self.open.wait()
            if self.failure is not None:
                raise self.failure
            for number in range(generation.partial_images):
                for index in range(generation.num_images):
                    yield flat_preview(generation, index, number)
            await self.finishing.wait()
            if self.late_failure is not None:
                raise self.late_failure
            for index in reversed(range(generation.num_images - self.missing_images)):
                image = flat_image(generation, index)
                # As long as a test let it wait, which is what a sampler would say.
                took = max(image.timings.denoise, (self._clock() - began) * 1000)
                timings = replace(image.timings, denoise=took)
                yield replace(image, timings=timings, truncated_tokens=self.truncated_tokens)
        finally:
            self.running -= 1
            self._running_images -= generation.num_images

    async def close(self) -> None:
        self.closed = True


def flat_image(generation: GenerationRequest, index: int) -> GeneratedImage:
    seed = generation.seed + index
    shape = (generation.height, generation.width, 3)
    return GeneratedImage(
        pixels=np.full(shape, seed % 256, dtype=np.uint8),
        index=index,
        seed=seed,
        step=generation.num_inference_steps,
        is_final=True,
        prompt_tokens=len(generation.prompt.split()),
        timings=Timings(queue=1.0, encode_text=2.0, denoise=30.0, decode=4.0),
    )


def flat_preview(generation: GenerationRequest, index: int, number: int) -> GeneratedImage:
    """At evenly spaced steps, as the sampler gives them."""
    step = generation.num_inference_steps * (number + 1) // (generation.partial_images + 1)
    return replace(flat_image(generation, index), step=step, is_final=False)


async def until(condition: Callable[[], bool], limit: float = 30.0) -> None:
    """Waits for something that another task does."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), limit)


async def until_sample(client: httpx.AsyncClient, name: str, value: float) -> None:
    """Waits until the gateway's metrics give a sample this value."""

    async def poll() -> None:
        while (await gateway_samples(client)).get(name, 0.0) != value:
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 30.0)


async def gateway_samples(client: httpx.AsyncClient) -> dict[str, float]:
    """What the gateway counts, by the name without its prefix, and the labels."""
    return samples_of((await client.get("/metrics")).text, "hypergen_gateway_")


def in_memory(app: Starlette, **options: Any) -> httpx.AsyncClient:
    """A client of the app without a network between. A 500 comes as a response, as it would over one."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", **options)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: signals are pytest's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def on_loopback(app: Starlette, **settings: Any) -> AsyncIterator[str]:
    """The app under uvicorn on a free port of 127.0.0.1, with settings of `make_uvicorn_config`; gives its base URL."""
    server = _Server(make_uvicorn_config(app, **settings))
    listener = Listener(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield url
    finally:
        server.should_exit = True
        await serving
