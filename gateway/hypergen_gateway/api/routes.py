"""What each route does. Endpoints only raise; the middleware answers.

Knows HTTP and the order of a request's steps; what a field means stands in `openai`, what
a client is told in `responses`.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from hypergen_gateway import playground
from hypergen_gateway.api import capabilities, docs, responses
from hypergen_gateway.api import validation as openai
from hypergen_gateway.api.bodies import media_type, read_form, read_json
from hypergen_gateway.api.client_hints import ClientHints, deadline_of, identify_request, read_client_hints
from hypergen_gateway.api.fields import EditForm, EditRequest, ImageRequest, PictureRequest, VariationForm, from_texts
from hypergen_gateway.api.openapi import describe_api
from hypergen_gateway.api.responses import Health
from hypergen_gateway.api.sse import EventStream, to_frame
from hypergen_gateway.concurrency import run_in_thread_if_large
from hypergen_gateway.config import Config
from hypergen_gateway.errors import HyperGenError, ModelNotFoundError, NotFoundError
from hypergen_gateway.generation.admission import Admission
from hypergen_gateway.generation.backend import Backend, ModelDescription
from hypergen_gateway.generation.image_inputs import InitImage, Uploads, Wanted, open_init_images
from hypergen_gateway.generation.jobs import Job, Jobs
from hypergen_gateway.generation.service import EncodedImage, ImageService, Order, parts_of
from hypergen_gateway.http.auth import METRICS_PATH
from hypergen_gateway.http.body_timeout import BodyTimeout
from hypergen_gateway.http.disconnect import run_until_disconnect
from hypergen_gateway.http.middleware import BodyLimit
from hypergen_gateway.http.paths import same_id
from hypergen_gateway.observability.metrics import MEDIA_TYPE, Metrics
from hypergen_gateway.storage.local import FILE_HEADERS, FILES_PATH, Links, LocalLinks

T = TypeVar("T")
Answer: TypeAlias = Callable[[Request], Awaitable[Response]]
# A tenth of a millisecond in base64.
_QUICK_BYTES = 128 << 10


@dataclass(frozen=True)
class Endpoints:
    """The routes of one gateway."""

    config: Config
    backend: Backend
    admission: Admission
    studio: ImageService
    jobs: Jobs
    links: Links
    metrics: Metrics
    # Images are opened by two threads at most: each may need a few hundred megabytes for a moment.
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def routes(self) -> list[BaseRoute]:
        """Every route, in the order in which they are tried: those that are wanted most come first."""
        patience = Middleware(BodyTimeout, seconds=self.config.body_timeout)
        bodies = [patience, Middleware(BodyLimit, max_bytes=self.config.max_body_bytes)]
        uploads = [
            patience,
            Middleware(
                BodyLimit, max_bytes=self.config.max_json_upload_bytes, max_form_bytes=self.config.max_upload_bytes
            ),
        ]
        return [
            _get("/v1/models", self.list_models),
            _post("/v1/images/generations", self.generate_images, bodies),
            _post("/v1/images/edits", self.edit_images, uploads),
            _post("/v1/images/variations", self.vary_image, uploads),
            _get(f"{FILES_PATH}/{{name}}", self.read_file),
            _get("/v1/models/{id:path}", self.retrieve_model),
            _get("/v1/capabilities", self.capabilities),
            _get("/health", self.health),
            _get("/health/live", self.live),
            _get("/health/ready", self.ready),
            _get(METRICS_PATH, self.read_metrics),
            _get("/openapi.json", self.openapi),
            _get("/docs", self.docs),
            *playground.routes(),
        ]

    async def openapi(self, _: Request) -> Response:
        """The API's description."""
        return JSONResponse(await self._description())

    async def docs(self, request: Request) -> Response:
        """The API's description, to be read."""
        page = docs.render(await self._description(), self.config.public_url or str(request.base_url))
        return HTMLResponse(page, headers=docs.HEADERS)

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

    async def read_metrics(self, _: Request) -> Response:
        """The gateway's own metrics; Triton has the sampler's."""
        return Response(self.metrics.exposition(), media_type=MEDIA_TYPE)

    async def list_models(self, _: Request) -> Response:
        """The one model."""
        return Response(_model_list(await self._model_id(), int(time.time())), media_type="application/json")

    async def retrieve_model(self, request: Request) -> Response:
        """The one model, by its id or an alias, which is answered as the id.

        OpenAI answers an alias so, too, and clients compare what they get with what they asked for.
        """
        wanted = request.path_params["id"]
        for known in (await self._model_id(), *self.config.model_aliases):
            if same_id(wanted, known):
                return _json(responses.ModelObject(id=known))
        raise ModelNotFoundError("This model does not exist; GET /v1/models lists the one that does.", "model")

    async def capabilities(self, _: Request) -> Response:
        """What the model draws and how; an extension."""
        model = await self.backend.describe()
        return _json(capabilities.of_model(model, await self._model_id(), self.config.size_policy))

    async def generate_images(self, request: Request) -> Response:
        """Pictures from a prompt."""
        payload = await read_json(request, ImageRequest.model_fields)
        model = await self.backend.describe()
        wanted = openai.read_request(payload, ImageRequest, model, self.config.size_policy)
        asked = openai.asked_size(wanted)
        if asked is not None:
            self.config.size_policy.check(asked, model)
        return await self._serve(request, wanted, [], model)

    async def edit_images(self, request: Request) -> Response:
        """Pictures from a prompt and images, with a mask or without."""
        if media_type(request) == "application/json":
            return await self._edit_by_json(request)
        async with read_form(request, EditForm.model_fields) as form:
            model = await self.backend.describe()
            wanted = openai.read_request(from_texts(form, EditForm), EditForm, model, self.config.size_policy)
            starts = await self._open(openai.uploads_of_form(wanted, openai.images_param(form)), wanted, model)
        return await self._serve(request, wanted, starts, model)

    async def _edit_by_json(self, request: Request) -> Response:
        payload = await read_json(request, EditRequest.model_fields)
        model = await self.backend.describe()
        wanted = openai.read_request(payload, EditRequest, model, self.config.size_policy)
        uploads = await asyncio.to_thread(openai.uploads_of_json, wanted, openai.images_param(payload))
        starts = await self._open(uploads, wanted, model)
        return await self._serve(request, wanted, starts, model)

    async def vary_image(self, request: Request) -> Response:
        """Pictures like an image."""
        async with read_form(request, VariationForm.model_fields) as form:
            model = await self.backend.describe()
            wanted = openai.read_request(from_texts(form, VariationForm), VariationForm, model, self.config.size_policy)
            starts = await self._open(openai.uploads_of_form(wanted, openai.images_param(form)), wanted, model)
        return await self._serve(request, wanted, starts, model)

    async def _open(self, uploads: Uploads, wanted: PictureRequest, model: ModelDescription) -> list[InitImage]:
        pictures = Wanted(size=openai.asked_size(wanted), count=wanted.n, may_stay=openai.may_stay(wanted, model))
        async with self.decoding:
            return await asyncio.to_thread(open_init_images, uploads, pictures, model, self.config.size_policy)

    async def _serve(
        self, request: Request, wanted: PictureRequest, starts: Sequence[InitImage], model: ModelDescription
    ) -> Response:
        order = Order(
            parts=parts_of(
                openai.to_generation(wanted, model),
                starts,
                openai.strength_of(wanted, model),
                openai.asked_size(wanted),
            ),
            model=model,
            file_format=openai.file_format_of(wanted),
        )
        request.state.drawn = {"images": order.num_images, "steps": order.num_images * order.num_inference_steps}
        caller = read_client_hints(request.headers)
        deadline = deadline_of(wanted, caller)
        asked = await run_in_thread_if_large(
            lambda: identify_request(caller, request.url.path, wanted, order), order.nbytes, quick=_QUICK_BYTES
        )
        job = self.jobs.join(asked, lambda: self.studio.take(order, deadline))
        limit = min(deadline or math.inf, self.config.request_timeout)
        with job.subscribe():
            if wanted.stream:
                return await self._stream(request, wanted, job, caller, limit)
            return await run_until_disconnect(request.receive, self._answer(request, wanted, job, caller), limit)

    async def read_file(self, request: Request) -> Response:
        """The picture behind a link."""
        if not isinstance(self.links, LocalLinks):
            raise NotFoundError("Links to pictures do not lead to this server.")
        query = request.query_params
        stored = await self.links.read(
            request.path_params["name"], query.get("expires", ""), query.get("signature", "")
        )
        headers = {"Cache-Control": f"private, max-age={stored.seconds_left}"}
        return Response(stored.content, media_type=stored.media_type, headers=FILE_HEADERS | headers)

    async def _answer(self, request: Request, wanted: PictureRequest, job: Job, caller: ClientHints) -> Response:
        finished = await job.finals()
        by_link = openai.wants_links(wanted, by_habit=caller.reads_links)
        urls = await self._publish(request, finished, job) if by_link else None
        headers = {"Server-Timing": responses.server_timing(finished), **_drawing_headers(job)}
        if cut := responses.truncated(finished[0]):
            headers["x-hypergen-prompt-truncated"] = str(cut)
        nbytes = sum(len(picture.file) for picture in finished)
        return await run_in_thread_if_large(
            lambda: _json(responses.images_response(wanted, finished, urls), headers=headers),
            nbytes,
            quick=_QUICK_BYTES,
        )

    async def _publish(self, request: Request, finished: Sequence[EncodedImage], job: Job) -> list[str]:
        base_url, file_format = self.config.public_url or str(request.base_url), job.drawing.order.file_format
        return await asyncio.gather(*(self.links.publish(picture.file, file_format, base_url) for picture in finished))

    async def _stream(
        self, request: Request, wanted: PictureRequest, job: Job, caller: ClientHints, limit: float
    ) -> Response:
        heartbeat = min(self.config.heartbeat_interval, (caller.patience or math.inf) / 2)
        stream = EventStream(_frames(wanted, job), heartbeat=heartbeat, limit=limit)
        await stream.begun(request.receive)
        stream.headers.update(_drawing_headers(job))
        return stream

    async def _model_id(self) -> str:
        return self.config.model_id or (await self.backend.describe()).model_id

    async def _description(self) -> dict[str, Any]:
        model = await _or_none(self.backend.describe(), self.config.probe_timeout)
        return describe_api(model, secured=self.config.needs_key)

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


class _Endpoint:
    """An endpoint as ASGI has it. Starlette would make it one that answers errors, as our own layer does anyway."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)


def _get(path: str, answer: Answer) -> Route:
    """A route of GET, and so of HEAD."""
    return Route(path, _Endpoint(answer), methods=["GET"])


def _post(path: str, answer: Answer, middleware: Sequence[Middleware]) -> Route:
    return Route(path, _Endpoint(answer), methods=["POST"], middleware=middleware)


async def _or_none(answer: Coroutine[Any, Any, T], limit: float) -> T | None:
    with suppress(asyncio.TimeoutError, HyperGenError):
        return await asyncio.wait_for(answer, limit)
    return None


async def _frames(wanted: PictureRequest, job: Job) -> AsyncGenerator[bytes, None]:
    previews: Counter[int] = Counter()
    async with aclosing(job.listen()) as pictures:
        async for finished in pictures:
            number = previews[finished.picture.index]
            previews[finished.picture.index] += 1
            frame = functools.partial(_frame, wanted, finished, number)
            yield await run_in_thread_if_large(frame, len(finished.file), quick=_QUICK_BYTES)


def _frame(wanted: PictureRequest, finished: EncodedImage, number: int) -> bytes:
    """The event that carries a picture; `number` counts a picture's previews. Blocks."""
    event = responses.image_event(wanted, finished, number)
    return to_frame(event.type, event)


def _drawing_headers(job: Job) -> dict[str, str]:
    """The place in the queue that a request had when it came, how long it was going to take, and the size that is drawn
    where it is not the one that is sent.
    """
    headers = {}
    if sizes := job.drawing.order.drawn_sizes:
        headers["x-hypergen-drawn-size"] = ", ".join(f"{width}x{height}" for width, height in sizes)
    if (place := job.drawing.place) is None:
        return headers
    headers["x-hypergen-queue-position"] = str(place.position)
    if place.estimate is not None:
        headers["x-hypergen-estimated-ms"] = str(round(place.estimate * 1000))
    return headers


@functools.lru_cache(maxsize=1)
def _model_list(model: str, created: int) -> str:
    """The answer that lists the one model, the same for a second."""
    return _to_json(responses.ModelList(data=[responses.ModelObject(id=model, created=created)]))


def _json(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_to_json(model), status_code=status, headers=headers, media_type="application/json")


def _to_json(model: BaseModel) -> str:
    # OpenAI leaves an unknown optional field out rather than sending null; health says null.
    return model.model_dump_json(exclude_none=not isinstance(model, Health))
