"""From what a request wants to its pictures' files.

Knows the order of the work: a place in the queue, the backend, what becomes of the pixels, the file. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from hypergen_gateway.admission import Admission
from hypergen_gateway.errors import InternalError
from hypergen_gateway.generation import Backend, Generation, ModelDescription, Picture
from hypergen_gateway.images import FileFormat, encode


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """A request's pictures: the model that draws them and the file format that they are sent in."""

    generation: Generation
    model: ModelDescription
    file_format: FileFormat


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A picture as a file, its size in pixels, and how long it took to encode in milliseconds."""

    picture: Picture
    file: bytes
    width: int
    height: int
    encode_image: float


class Studio:
    """Draws orders."""

    def __init__(self, backend: Backend, admission: Admission) -> None:
        self._backend = backend
        self._admission = admission

    async def draw(self, order: Order) -> AsyncGenerator[Picture, None]:
        """Previews and pictures as they come; the wait for a place counts as time in the queue.

        Raises whatever the backend does, and `InternalError` if a picture is missing at the end.
        """
        generation = order.generation
        began = time.perf_counter()
        finals: Counter[int] = Counter()
        async with self._admission.admit(generation.num_images, order.model.max_active_images):
            waited = _milliseconds_since(began)
            async with aclosing(self._backend.generate(generation)) as pictures:
                async for picture in pictures:
                    finals[picture.index] += picture.is_final
                    yield _waited(picture, waited)
        if finals.total() != generation.num_images:
            raise InternalError(f"{finals.total()} pictures came back instead of {generation.num_images}")

    async def draw_finals(self, order: Order) -> list[Finished]:
        """The finished pictures, in the order of their indices. They are encoded after their place was given up."""
        async with aclosing(self.draw(order)) as stream:
            pictures = [picture async for picture in stream if picture.is_final]
        pictures.sort(key=lambda picture: picture.index)
        return await asyncio.gather(*(asyncio.to_thread(finish, picture, order.file_format) for picture in pictures))


def finish(picture: Picture, file_format: FileFormat) -> Finished:
    """A picture's file. Blocks, so it is called in a thread."""
    began = time.perf_counter()
    height, width, _ = picture.pixels.shape
    file = encode(picture.pixels, file_format)
    return Finished(picture=picture, file=file, width=width, height=height, encode_image=_milliseconds_since(began))


def _waited(picture: Picture, milliseconds: float) -> Picture:
    timings = replace(picture.timings, queue=picture.timings.queue + milliseconds)
    return replace(picture, timings=timings)


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
