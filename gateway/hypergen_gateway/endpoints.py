"""What each route does. Endpoints only raise; the middleware answers.

Knows HTTP and the order of a request's steps; what a field means stands in `openai`, what a picture costs in Triton.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive

from hypergen_gateway import images, openai
from hypergen_gateway.admission import Admission
from hypergen_gateway.config import Config
from hypergen_gateway.errors import (
    ClientClosedRequestError,
    DeadlineExceededError,
    HyperGenError,
    InternalError,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from hypergen_gateway.generation import Backend, Generation, ModelDescription, Picture

T = TypeVar("T")


class Health(BaseModel):
    """How the server is. What only Triton knows is null until it has told."""

    status: Literal["healthy", "unhealthy"]
    model: str | None
    queue_size: int
    device: str | None


@dataclass(frozen=True)
class Endpoints:
    """The routes of one gateway."""

    config: Config
    backend: Backend
    admission: Admission

    def routes(self) -> list[BaseRoute]:
        """Every route. Starlette answers HEAD wherever it answers GET."""
        return [
            Route("/health", self.health),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{id:path}", self.retrieve_model),
            Route("/v1/images/generations", self.generate_images, methods=["POST"]),
        ]

    async def health(self, _: Request) -> Response:
        """200 while the process lives; the body says how Triton is."""
        return _json(await self._health())

    async def live(self, _: Request) -> Response:
        """200 while the process lives, whatever Triton does: only the gateway itself is worth a restart here."""
        return Response(b'{"status":"live"}', media_type="application/json")

    async def ready(self, _: Request) -> Response:
        """200 when a picture could be made, else 503."""
        health = await self._health()
        return _json(health, status=200 if health.status == "healthy" else 503)

    async def list_models(self, _: Request) -> Response:
        """The one model."""
        return _json(openai.ModelList(data=[openai.ModelObject(id=await self._model_id())]))

    async def retrieve_model(self, request: Request) -> Response:
        """The one model, if the id is its own to the letter."""
        wanted = request.path_params["id"]
        if wanted != await self._model_id():
            raise ModelNotFoundError("This model does not exist; GET /v1/models lists the one that does.", "model")
        return _json(openai.ModelObject(id=wanted))

    async def generate_images(self, request: Request) -> Response:
        """Pictures from a prompt."""
        payload = openai.parse_json(await _json_body(request))
        model = await self.backend.describe()
        wanted = openai.read_image_request(payload, model)
        generation = openai.to_generation(wanted, model)
        work = self._make(generation, model)
        finished = await while_connected(request.receive, work, self.config.request_timeout)
        return await asyncio.to_thread(_json, openai.images_response(wanted, generation, finished))

    async def _make(self, generation: Generation, model: ModelDescription) -> list[tuple[Picture, str]]:
        async with (
            self.admission.admit(generation.num_images, model.max_active_images),
            aclosing(self.backend.generate(generation)) as stream,
        ):
            pictures = [picture async for picture in stream]
        if len(pictures) != generation.num_images:
            raise InternalError(f"{len(pictures)} pictures came back instead of {generation.num_images}")
        encoded = await asyncio.gather(
            *(asyncio.to_thread(images.to_base64_png, picture.pixels) for picture in pictures)
        )
        return list(zip(pictures, encoded, strict=True))

    async def _model_id(self) -> str:
        return self.config.model_id or (await self.backend.describe()).model_id

    async def _health(self) -> Health:
        limit = self.config.probe_timeout
        ready, model = await asyncio.gather(
            _or_none(self.backend.ready(), limit), _or_none(self.backend.describe(), limit)
        )
        return Health(
            status="healthy" if ready and model else "unhealthy",
            model=self.config.model_id or (model.model_id if model else None),
            queue_size=self.admission.waiting,
            device=model.device if model else None,
        )


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], limit: float) -> T:
    """The result of `work`, which is cancelled when the client leaves or `limit` seconds have passed."""
    job = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({job, departure}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if job.cancelled():  # by nobody here: gRPC says so when its channel is closed
            raise UnavailableError("The server is shutting down.")
        if job.done():
            return job.result()
        if departure.done():
            raise ClientClosedRequestError("The client closed the request.")
        raise DeadlineExceededError(f"The pictures were not ready within {limit:g} seconds.")
    finally:
        job.cancel()
        departure.cancel()
        await asyncio.gather(job, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _or_none(answer: Coroutine[Any, Any, T], limit: float) -> T | None:
    with suppress(asyncio.TimeoutError, HyperGenError):
        return await asyncio.wait_for(answer, limit)
    return None


async def _json_body(request: Request) -> bytes:
    body = await request.body()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # An empty body says more about what is wrong than its type, which clients then leave out.
    if body and media_type != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON, sent with 'Content-Type: application/json'.")
    return body


def _json(model: BaseModel, status: int = 200) -> Response:
    content = model.model_dump_json(exclude=_absent(model))
    return Response(content, status_code=status, media_type="application/json")


def _absent(model: BaseModel) -> set[str]:
    """OpenAI leaves an unknown optional field out rather than sending null; health says null."""
    return set() if isinstance(model, Health) else {name for name, value in model if value is None}
