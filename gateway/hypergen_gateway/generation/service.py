"""From a client request to encoded images: admission, backend, compositing, encoding. Does not depend on HTTP."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from hypergen_gateway.concurrency import ByteBudget, cancel, run_in_thread_if_large
from hypergen_gateway.errors import HyperGenError, InternalError
from hypergen_gateway.generation.admission import Admission, Slot
from hypergen_gateway.generation.backend import Backend, GeneratedImage
from hypergen_gateway.generation.images import FileFormat, encode
from hypergen_gateway.generation.latency import work_of
from hypergen_gateway.generation.request import ClientRequest, SubRequest
from hypergen_gateway.generation.sizes import Size

# Encoded as PNG within a fifth of a millisecond.
_QUICK_BYTES = 16 << 10
# Pixels being encoded at a time: ten images of 4096 × 4096, or all that a GPU generates in a second.
_ENCODING_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class RawImage:
    """A preview or an image as generated, and the sub-request it belongs to."""

    sub_request: SubRequest
    image: GeneratedImage

    @property
    def nbytes(self) -> int:
        """The memory of its pixels: as generated, and as composited."""
        compositing = self.sub_request.compositing
        composited = 0 if compositing is None else math.prod(compositing.size) * self.image.pixels.shape[-1]
        return self.image.pixels.nbytes + composited


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """A preview or an image as a file."""

    sub_request: SubRequest
    image: GeneratedImage
    file: bytes
    size: Size
    encode_ms: float

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return len(self.file) + self.image.pixels.nbytes


class Observer(Protocol):
    """Is notified of the progress of requests. Seconds count from the start of the request."""

    def rejected(self, error: HyperGenError) -> None:
        """Admission rejected a request."""
        ...

    def image_ready(self, encoded: EncodedImage, seconds: float, *, is_first: bool) -> None:
        """A preview or an image is ready; `is_first` of its kind."""
        ...

    def completed(self, slot: Slot, seconds: float) -> None:
        """All images of a request are generated."""
        ...

    def cancelled(self, steps: float) -> None:
        """A request was cancelled, which saves this many steps."""
        ...


class ImageService:
    """Generates the images of client requests: admission, backend, encoding."""

    def __init__(self, backend: Backend, admission: Admission, observers: Sequence[Observer] = ()) -> None:
        self.backend = backend
        self.admission = admission
        self.observers = observers
        self.encoding = ByteBudget(_ENCODING_BYTES)


class GenerationTask:
    """One request on its way through the service; run once. `slot` is known once it has begun."""

    def __init__(self, service: ImageService, request: ClientRequest) -> None:
        self.request = request
        self.slot: Slot | None = None
        self._service = service
        self._began = time.perf_counter()
        self._seen = set[bool]()  # `is_final` of the images so far

    async def images(self) -> AsyncGenerator[EncodedImage, None]:
        """Previews and images as files, in the order in which they are generated.

        Raises whatever admission and the backend do, and `InternalError` if an image is missing at the end.
        """
        files: asyncio.Queue[asyncio.Future[EncodedImage] | None] = asyncio.Queue()
        generating = asyncio.create_task(self._generate_into(files))
        try:
            while (file := await files.get()) is not None:
                encoded = await file
                self._notify(encoded)
                yield encoded
            await generating
        finally:
            await cancel(generating)

    def _notify(self, encoded: EncodedImage) -> None:
        is_final = encoded.image.is_final
        for observer in self._service.observers:
            observer.image_ready(encoded, self._seconds(), is_first=is_final not in self._seen)
        self._seen.add(is_final)

    async def _generate_into(self, files: asyncio.Queue[asyncio.Future[EncodedImage] | None]) -> None:
        """Starts encoding each image without waiting for the result, so that the slot is released earlier.

        If images are generated faster than they can be encoded, the slot is held until encoding has caught up.
        """
        try:
            async with aclosing(self._generate()) as raw_images:
                async for raw in raw_images:
                    await self._service.encoding.acquire(raw.nbytes)
                    files.put_nowait(self._encode(raw))
        finally:
            files.put_nowait(None)

    def _encode(self, raw: RawImage) -> asyncio.Future[EncodedImage]:
        work = functools.partial(encode_image, raw, self.request.file_format)
        file = asyncio.ensure_future(run_in_thread_if_large(work, raw.nbytes, quick=_QUICK_BYTES))
        # Not in a `finally` of the work: a task that is cancelled before it begins never runs it.
        file.add_done_callback(lambda _: self._service.encoding.release(raw.nbytes))
        return file

    async def _generate(self) -> AsyncGenerator[RawImage, None]:
        """Previews and images as they arrive; the wait for a slot counts as time in the queue."""
        finals = 0
        async with self._acquire_slot() as slot:
            waited = _milliseconds_since(self._began)
            streams = [self._generate_sub_request(sub_request) for sub_request in self.request.sub_requests]
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as raw_images:
                async for raw in raw_images:
                    if raw.image.is_final:
                        finals += 1
                        slot.denoising = max(slot.denoising or 0.0, raw.image.timings.denoise / 1000)
                    timings = replace(raw.image.timings, queue=raw.image.timings.queue + waited)
                    yield replace(raw, image=replace(raw.image, timings=timings))
        if finals != self.request.num_images:
            raise InternalError(f"{finals} images were generated instead of {self.request.num_images}")

    @asynccontextmanager
    async def _acquire_slot(self) -> AsyncIterator[Slot]:
        """Holds a slot, and tells the observers the outcome."""
        admission, observers, request = self._service.admission, self._service.observers, self.request
        try:
            slot = admission.enter(work_of(request), request.model.max_active_images, request.deadline)
        except HyperGenError as error:
            for observer in observers:
                observer.rejected(error)
            raise
        self.slot = slot
        remaining_rounds = slot.rounds
        try:
            async with admission.acquire(slot):
                try:
                    yield slot
                finally:
                    remaining_rounds = admission.remaining_rounds(slot)
        except (asyncio.CancelledError, GeneratorExit):
            for observer in observers:
                observer.cancelled(remaining_rounds * slot.images)
            raise
        for observer in observers:
            observer.completed(slot, self._seconds())

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    async def _generate_sub_request(self, sub_request: SubRequest) -> AsyncGenerator[RawImage, None]:
        async with aclosing(self._service.backend.generate(sub_request.generation)) as images:
            async for image in images:
                numbered = replace(image, index=sub_request.first_index + image.index)
                yield RawImage(sub_request=sub_request, image=numbered)


def encode_image(raw: RawImage, file_format: FileFormat) -> EncodedImage:
    """Composites an image and encodes it. Blocks."""
    began = time.perf_counter()
    pixels, compositing = raw.image.pixels, raw.sub_request.compositing
    if compositing is not None:
        # After no step, the image is the init image: returned as it came rather than scaled there and back.
        unchanged = compositing.kept if raw.image.step == 0 else None
        pixels = compositing.apply(pixels) if unchanged is None else unchanged
    height, width, _ = pixels.shape
    return EncodedImage(
        sub_request=raw.sub_request,
        image=raw.image,
        file=encode(pixels, file_format),
        size=(width, height),
        encode_ms=_milliseconds_since(began),
    )


async def _merge(streams: Sequence[AsyncGenerator[RawImage, None]]) -> AsyncGenerator[RawImage, None]:
    """The images of several streams in order of arrival. The first failure ends all streams, as does closing this."""
    queue: asyncio.Queue[RawImage | None] = asyncio.Queue()

    async def collect(stream: AsyncGenerator[RawImage, None]) -> None:
        try:
            async with aclosing(stream):
                async for raw in stream:
                    queue.put_nowait(raw)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(collect(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            raw = await queue.get()
            if raw is not None:
                yield raw
                continue
            running -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        await cancel(*tasks)


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
