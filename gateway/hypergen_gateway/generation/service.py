"""From what a request wants to its pictures' files.

Knows the order of the work: a place in the queue, the backend, what becomes of the pixels, the file. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from hypergen_gateway.concurrency import ByteBudget, run_in_thread_if_large
from hypergen_gateway.errors import HyperGenError, InternalError
from hypergen_gateway.generation.admission import Admission, Slot
from hypergen_gateway.generation.backend import Backend, GeneratedImage, GenerationRequest, ModelDescription
from hypergen_gateway.generation.image_inputs import Compositing, InitImage
from hypergen_gateway.generation.images import FileFormat, encode
from hypergen_gateway.generation.latency import Work
from hypergen_gateway.generation.sizes import Size
from hypergen_gateway.http.disconnect import cancel

# What a row takes of a step in which deep features are reused, against one that goes through the whole UNet.
_SHALLOW = 0.25
# A fifth of a millisecond in a PNG.
_QUICK_BYTES = 16 << 10
# Pixels that are made into files at a time: ten pictures of 4096 × 4096, or all that a GPU draws in a second.
_ENCODING_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class SubRequest:
    """Pictures that the backend draws together: of one size, from one image if from any."""

    generation: GenerationRequest
    first_index: int = 0
    retouch: Compositing | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """A request's pictures: the model that draws them and the file format that they are sent in."""

    parts: Sequence[SubRequest]
    model: ModelDescription
    file_format: FileFormat

    @property
    def num_images(self) -> int:
        """How many pictures there will be."""
        return sum(part.generation.num_images for part in self.parts)

    @property
    def num_inference_steps(self) -> int:
        """The steps that each picture was asked for with."""
        return self.parts[0].generation.num_inference_steps

    @property
    def drawn_sizes(self) -> list[Size]:
        """The sizes that are drawn, each once, of the pictures that are sent in another."""
        drawn = [(part, (part.generation.width, part.generation.height)) for part in self.parts]
        return list(dict.fromkeys(size for part, size in drawn if part.retouch and part.retouch.size != size))

    @property
    def nbytes(self) -> int:
        """The memory that the images take that it starts from."""
        kept = (part.retouch.kept for part in self.parts if part.retouch is not None)
        given = (array for part in self.parts for array in (part.generation.image, part.generation.mask))
        return sum(array.nbytes for array in (*given, *kept) if array is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class RawImage:
    """A preview or a picture, and the part of the order that it belongs to."""

    part: SubRequest
    picture: GeneratedImage

    @property
    def nbytes(self) -> int:
        """The memory of the pixels that are turned into its file: as drawn, and as retouched."""
        retouch = self.part.retouch
        retouched = math.prod(retouch.size) * self.picture.pixels.shape[-1] if retouch is not None else 0
        return self.picture.pixels.nbytes + retouched


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """A picture as a file, its size in pixels, and how long it took to encode in milliseconds."""

    part: SubRequest
    picture: GeneratedImage
    file: bytes
    size: tuple[int, int]
    encode_image: float

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return len(self.file) + self.picture.pixels.nbytes


def parts_of(
    generation: GenerationRequest, starts: Sequence[InitImage], strength: float | None, asked: Size | None = None
) -> list[SubRequest]:
    """What draws the pictures of `generation`, where picture i starts from image i mod k.

    Those that start from none are sent in the size that is `asked`; None is the one that they are drawn in.
    """
    if not starts:
        is_scaled = asked not in (None, (generation.width, generation.height))
        return [SubRequest(generation=generation, retouch=Compositing(size=asked) if asked and is_scaled else None)]
    if len(starts) == 1:
        return [_part_from(generation, starts[0], strength)]
    singles = [
        replace(generation, num_images=1, seed=generation.seed + index) for index in range(generation.num_images)
    ]
    return [
        replace(_part_from(single, starts[index % len(starts)], strength), first_index=index)
        for index, single in enumerate(singles)
    ]


def _part_from(generation: GenerationRequest, start: InitImage, strength: float | None) -> SubRequest:
    height, width, _ = start.image.shape
    started = replace(generation, width=width, height=height, image=start.image, mask=start.mask, strength=strength)
    return SubRequest(generation=started, retouch=start.retouch)


def work_of(order: Order) -> Work:
    """What an order asks of the sampler. A picture that starts from an image takes the last part of its steps."""
    model = order.model
    loads = [_load(part.generation, model) for part in order.parts]
    strengths = [1.0 if part.generation.strength is None else part.generation.strength for part in order.parts]
    return Work(
        images=order.num_images,
        steps=max(order.num_inference_steps * max(strengths), 1.0),
        load=sum(loads) / len(loads) / (model.default_width * model.default_height),
    )


def _load(generation: GenerationRequest, model: ModelDescription) -> float:
    """Rows times pixels that a picture adds to a round, on the mean of its steps.

    The mean tells the whole truth, as a round's time is taken for a line over its load.
    """
    interval = generation.cache_interval or 1
    depth = (1.0 + (interval - 1) * _SHALLOW) / interval
    return _rows(generation, model) * depth * generation.width * generation.height


def _rows(generation: GenerationRequest, model: ModelDescription) -> float:
    """Rows of the UNet that a picture takes: two in the steps under classifier-free guidance, else one."""
    if generation.guidance_scale <= 1 or model.guidance_width:
        return 1.0
    end = 1.0 if generation.guidance_end is None else generation.guidance_end
    return 1.0 + end - (generation.guidance_start or 0.0)


class Observer(Protocol):
    """Is told how drawings go. The seconds are those since the drawing began."""

    def refused(self, error: HyperGenError) -> None:
        """It was not let in."""
        ...

    def came(self, finished: EncodedImage, seconds: float, *, is_first: bool) -> None:
        """A preview or a picture is there; the first of its kind, or not."""
        ...

    def completed(self, place: Slot, seconds: float) -> None:
        """All of its pictures are drawn."""
        ...

    def abandoned(self, steps: float) -> None:
        """It was given up, which saves these many steps of its images."""
        ...


class ImageService:
    """Draws orders."""

    def __init__(self, backend: Backend, admission: Admission, observers: Sequence[Observer] = ()) -> None:
        self.backend = backend
        self.admission = admission
        self.observers = observers
        self.encoding = ByteBudget(_ENCODING_BYTES)

    def take(self, order: Order, deadline: float | None = None) -> GenerationTask:
        """An order to be drawn, within `deadline` seconds if at all."""
        return GenerationTask(self, order, deadline)


class GenerationTask:
    """An order on its way, drawn once. `place` is known once it has begun."""

    def __init__(self, studio: ImageService, order: Order, deadline: float | None) -> None:
        self.order = order
        self.place: Slot | None = None
        self._studio = studio
        self._deadline = deadline
        self._began = time.perf_counter()
        self._kinds = set[bool]()  # finals, previews or both, of those that have come

    async def pictures(self) -> AsyncGenerator[EncodedImage, None]:
        """Previews and pictures as files, in the order in which they are drawn.

        Raises whatever admission and the backend do, and `InternalError` if a picture is missing at the end.
        """
        files: asyncio.Queue[asyncio.Future[EncodedImage] | None] = asyncio.Queue()
        drawing = asyncio.create_task(self._draw_into(files))
        try:
            while (file := await files.get()) is not None:
                finished = await file
                self._tell_of(finished)
                yield finished
            await drawing
        finally:
            await cancel(drawing)

    def _tell_of(self, finished: EncodedImage) -> None:
        is_final = finished.picture.is_final
        for observer in self._studio.observers:
            observer.came(finished, self._seconds(), is_first=is_final not in self._kinds)
        self._kinds.add(is_final)

    async def _draw_into(self, files: asyncio.Queue[asyncio.Future[EncodedImage] | None]) -> None:
        """Starts each picture's encoding without waiting for its end: the place in the queue is given up before.

        Where more is drawn than can be encoded, the place is held until it can.
        """
        try:
            async with aclosing(self._draw()) as everything:
                async for drawn in everything:
                    await self._studio.encoding.take(drawn.nbytes)
                    files.put_nowait(self._encode(drawn))
        finally:
            files.put_nowait(None)

    def _encode(self, drawn: RawImage) -> asyncio.Future[EncodedImage]:
        work = functools.partial(finish, drawn, self.order.file_format)
        file = asyncio.ensure_future(run_in_thread_if_large(work, drawn.nbytes, quick=_QUICK_BYTES))
        # Not in a `finally` of the work: what is cancelled before it begins has none.
        file.add_done_callback(lambda _: self._studio.encoding.give_back(drawn.nbytes))
        return file

    async def _draw(self) -> AsyncGenerator[RawImage, None]:
        """Previews and pictures as they come; the wait for a place counts as time in the queue."""
        order = self.order
        finals = 0
        async with self._turn() as place:
            waited = _milliseconds_since(self._began)
            streams = [self._draw_part(part) for part in order.parts]
            async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as everything:
                async for drawn in everything:
                    if drawn.picture.is_final:
                        finals += 1
                        place.denoising = max(place.denoising or 0.0, drawn.picture.timings.denoise / 1000)
                    yield replace(drawn, picture=_waited(drawn.picture, waited))
        if finals != order.num_images:
            raise InternalError(f"{finals} pictures came back instead of {order.num_images}")

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Slot]:
        """Holds a place, and tells the observers what became of it."""
        admission, observers = self._studio.admission, self._studio.observers
        try:
            place = admission.arrive(work_of(self.order), self.order.model.max_active_images, self._deadline)
        except HyperGenError as error:
            for observer in observers:
                observer.refused(error)
            raise
        self.place = place
        rounds_left = place.rounds
        try:
            async with admission.turn(place):
                try:
                    yield place
                finally:
                    rounds_left = admission.rounds_left(place)
        except (asyncio.CancelledError, GeneratorExit):
            for observer in observers:
                observer.abandoned(rounds_left * place.places)
            raise
        for observer in observers:
            observer.completed(place, self._seconds())

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    async def _draw_part(self, part: SubRequest) -> AsyncGenerator[RawImage, None]:
        async with aclosing(self._studio.backend.generate(part.generation)) as pictures:
            async for picture in pictures:
                yield RawImage(part=part, picture=replace(picture, index=part.first_index + picture.index))


def finish(drawn: RawImage, file_format: FileFormat) -> EncodedImage:
    """A picture's file. Blocks."""
    began = time.perf_counter()
    pixels, retouch = drawn.picture.pixels, drawn.part.retouch
    if retouch is not None:
        kept = retouch.kept if drawn.picture.step == 0 else None
        pixels = retouch.apply(pixels) if kept is None else kept
    height, width, _ = pixels.shape
    return EncodedImage(
        part=drawn.part,
        picture=drawn.picture,
        file=encode(pixels, file_format),
        size=(width, height),
        encode_image=_milliseconds_since(began),
    )


async def _merged(streams: Sequence[AsyncGenerator[RawImage, None]]) -> AsyncGenerator[RawImage, None]:
    """What several streams give, as it comes. The first failure ends all of them, and so does closing this one."""
    came: asyncio.Queue[RawImage | None] = asyncio.Queue()

    async def collect(stream: AsyncGenerator[RawImage, None]) -> None:
        try:
            async with aclosing(stream):
                async for drawn in stream:
                    came.put_nowait(drawn)
        finally:
            came.put_nowait(None)

    tasks = [asyncio.create_task(collect(stream)) for stream in streams]
    under_way = len(tasks)
    try:
        while under_way:
            drawn = await came.get()
            if drawn is not None:
                yield drawn
                continue
            under_way -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        await cancel(*tasks)


def _waited(picture: GeneratedImage, milliseconds: float) -> GeneratedImage:
    timings = replace(picture.timings, queue=picture.timings.queue + milliseconds)
    return replace(picture, timings=timings)


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
