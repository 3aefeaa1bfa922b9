"""The routes of the API. Endpoints raise errors, which `ExceptionMiddleware` turns into responses."""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from hypergen_gateway import playground
from hypergen_gateway.api import capabilities, docs, responses
from hypergen_gateway.api.bodies import media_type, read_form, read_json
from hypergen_gateway.api.client_request import init_image_options, to_client_request
from hypergen_gateway.api.fields import (
    EditForm,
    EditRequest,
    ImageRequest,
    LoraForm,
    RequestBody,
    VariationForm,
    from_texts,
)
from hypergen_gateway.api.lora_uploads import read_upload
from hypergen_gateway.api.loras import with_prompt_loras
from hypergen_gateway.api.openapi import describe_api
from hypergen_gateway.api.responses import Health
from hypergen_gateway.api.sse import EventStream, to_frame
from hypergen_gateway.api.validation import images_param, uploads_of_form, uploads_of_json, validate
from hypergen_gateway.concurrency import run_in_thread_if_large, run_with_timeout
from hypergen_gateway.config import Config
from hypergen_gateway.errors import HyperGenError, ModelNotFoundError, NotFoundError, PermissionDeniedError
from hypergen_gateway.generation.admission import Admission
from hypergen_gateway.generation.backend import Backend, ModelDescription
from hypergen_gateway.generation.image_inputs import InitImage, Uploads, read_init_images
from hypergen_gateway.generation.images import FileFormat
from hypergen_gateway.generation.jobs import Job, Jobs
from hypergen_gateway.generation.request import ClientRequest
from hypergen_gateway.generation.service import EncodedImage
from hypergen_gateway.http.auth import METRICS_PATH
from hypergen_gateway.http.body_timeout import BodyTimeout
from hypergen_gateway.http.disconnect import run_until_disconnect
from hypergen_gateway.http.middleware import BodyLimit
from hypergen_gateway.http.paths import same_id
from hypergen_gateway.observability.metrics import MEDIA_TYPE, Metrics
from hypergen_gateway.storage.local import FILE_HEADERS, FILES_PATH, Links, LocalLinks
from hypergen_gateway.storage.lora_files import LoraFiles

T = TypeVar("T")
Form = TypeVar("Form", EditForm, VariationForm)
# Encoding this many bytes as base64 takes a tenth of a millisecond.
_QUICK_BYTES = 128 << 10


@dataclass(frozen=True, eq=False)
class Endpoints:
    """The endpoints of one gateway."""

    config: Config
    backend: Backend
    admission: Admission
    jobs: Jobs
    links: Links
    metrics: Metrics
    # At most two threads decode uploads: each may need a few hundred megabytes for a moment.
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def routes(self) -> list[BaseRoute]:
        """All routes, the most used first."""
        timeout = Middleware(BodyTimeout, seconds=self.config.body_timeout)
        bodies = [timeout, Middleware(BodyLimit, max_bytes=self.config.max_body_bytes)]
        uploads = [
            timeout,
            Middleware(
                BodyLimit, max_bytes=self.config.max_json_upload_bytes, max_form_bytes=self.config.max_upload_bytes
            ),
        ]
        lora_uploads = [timeout, Middleware(BodyLimit, max_bytes=self.config.max_lora_bytes)]
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/images/generations", self.generate_images, methods=["POST"], middleware=bodies),
            Route("/v1/images/edits", self.edit_images, methods=["POST"], middleware=uploads),
            Route("/v1/images/variations", self.vary_image, methods=["POST"], middleware=uploads),
            Route(f"{FILES_PATH}/{{name}}", self.read_file),
            Route("/v1/models/{id:path}", self.retrieve_model),
            Route("/v1/capabilities", self.capabilities),
            Route("/v1/loras", self.loras, methods=["GET", "POST"], middleware=lora_uploads),
            Route("/v1/loras/{name}", self.remove_lora, methods=["DELETE"]),
            Route("/health", self.health),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route(METRICS_PATH, self.read_metrics),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.docs),
            *playground.routes(),
        ]

    async def openapi(self, _: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(await self._description())

    async def docs(self, request: Request) -> Response:
        """The OpenAPI document as an HTML page."""
        page = docs.render(await self._description(), self.config.public_url or str(request.base_url))
        return HTMLResponse(page, headers=docs.HEADERS)

    async def health(self, _: Request) -> Response:
        """200 while the process is alive; the body has the state of Triton."""
        return _json(await self._health())

    async def live(self, _: Request) -> Response:
        """200 while the process is alive: if only Triton is down, restarting the gateway would not help."""
        return Response(b'{"status":"live"}', media_type="application/json")

    async def ready(self, _: Request) -> Response:
        """200 if an image could be generated now, else 503."""
        health = await self._health()
        return _json(health, status=200 if health.status == "healthy" else 503)

    async def read_metrics(self, _: Request) -> Response:
        """The gateway's metrics; Triton exposes the sampler's."""
        return Response(self.metrics.exposition(), media_type=MEDIA_TYPE)

    async def list_models(self, _: Request) -> Response:
        """A list of the one model."""
        return _json(responses.ModelList(data=[responses.ModelObject(id=await self._model_id())]))

    async def retrieve_model(self, request: Request) -> Response:
        """The one model, by its id or an alias.

        An alias is returned as the id, as OpenAI does: clients compare the response with their request.
        """
        requested = request.path_params["id"]
        for known in (await self._model_id(), *self.config.model_aliases):
            if same_id(requested, known):
                return _json(responses.ModelObject(id=known))
        raise ModelNotFoundError("This model does not exist. GET /v1/models lists the served model.", "model")

    async def capabilities(self, _: Request) -> Response:
        """The capabilities of the model; an extension."""
        model = await self._describe()
        return _json(capabilities.of_model(model, await self._model_id(), self.config.size_policy))

    async def loras(self, request: Request) -> Response:
        """The LoRAs that requests may name, and files that cannot be served; or one more. An extension."""
        if request.method == "POST":
            return await self._add_lora(request)
        model = await self.backend.describe()
        return _json(responses.lora_list(model.loras, self.backend.rejected_loras))

    async def _add_lora(self, request: Request) -> Response:
        """Store a LoRA's file, which is then served, or listed with the reason why not."""
        files = self._lora_files(request)
        model = await self._describe()
        fixed = {lora.name for lora in model.loras if not lora.is_of_folder}
        async with read_form(request, LoraForm.model_fields) as form:
            upload = await asyncio.to_thread(read_upload, form, fixed)
            await asyncio.to_thread(files.save, upload.name, upload.file.file)
        return _json(responses.LoraObject(name=upload.name), status=202)

    async def remove_lora(self, request: Request) -> Response:
        """Remove a LoRA's file. Requests that use it are not affected; an extension."""
        name = request.path_params["name"]
        if not await asyncio.to_thread(self._lora_files(request).remove, name):
            raise NotFoundError("There is no such LoRA file. GET /v1/loras lists those that are served.", "name")
        return _json(responses.DeletedLora(name=name))

    def _lora_files(self, request: Request) -> LoraFiles:
        """The folder of LoRAs, for a key that may change it."""
        if self.config.lora_dir is None:
            raise NotFoundError("This server has no folder for LoRAs; its operator can name one with --lora-dir.")
        if getattr(request.state, "key_name", None) not in self.config.lora_admins:
            raise PermissionDeniedError("This API key may not add or remove LoRAs; see --lora-admin.")
        return LoraFiles(self.config.lora_dir)

    async def generate_images(self, request: Request) -> Response:
        """Images from a prompt."""
        payload = await read_json(request, ImageRequest.model_fields)
        model = await self._describe()
        body = validate(payload, ImageRequest, model, self.config.size_policy)
        return await self._respond(request, body, [], model)

    async def edit_images(self, request: Request) -> Response:
        """Images from a prompt and images, with or without a mask."""
        if media_type(request) != "application/json":
            return await self._respond_to_form(request, EditForm)
        payload = await read_json(request, EditRequest.model_fields)
        model = await self._describe()
        body = validate(payload, EditRequest, model, self.config.size_policy)
        uploads = await asyncio.to_thread(uploads_of_json, body, images_param(payload))
        init_images = await self._read_init_images(uploads, body, model)
        return await self._respond(request, body, init_images, model)

    async def vary_image(self, request: Request) -> Response:
        """Variations of an image."""
        return await self._respond_to_form(request, VariationForm)

    async def _respond_to_form(self, request: Request, kind: type[Form]) -> Response:
        async with read_form(request, kind.model_fields) as form:
            model = await self._describe()
            body = validate(from_texts(form, kind), kind, model, self.config.size_policy)
            init_images = await self._read_init_images(uploads_of_form(body, images_param(form)), body, model)
        return await self._respond(request, body, init_images, model)

    async def _describe(self) -> ModelDescription:
        """The model, with this server's own defaults, as far as the model has what they are of."""
        model, config = await self.backend.describe(), self.config
        weighting, clip_skip = config.prompt_weighting, config.clip_skip
        if weighting in model.prompt_weightings:
            model = replace(model, default_prompt_weighting=weighting)
        if clip_skip is not None:
            model = replace(model, default_clip_skip=min(clip_skip, model.max_clip_skip))
        return model

    async def _read_init_images(self, uploads: Uploads, body: RequestBody, model: ModelDescription) -> list[InitImage]:
        options = init_image_options(body, model)
        async with self.decoding:
            return await asyncio.to_thread(read_init_images, uploads, options, model, self.config.size_policy)

    async def _respond(
        self, request: Request, body: RequestBody, init_images: Sequence[InitImage], model: ModelDescription
    ) -> Response:
        if self.config.prompt_loras:
            body = with_prompt_loras(body)
        work = functools.partial(to_client_request, body, init_images, model, request.headers, request.url.path)
        nbytes = sum(init_image.nbytes for init_image in init_images)
        client_request = await run_in_thread_if_large(work, nbytes, quick=_QUICK_BYTES)
        images = client_request.num_images
        request.state.generation = {"images": images, "steps": images * client_request.num_inference_steps}
        limit = min(client_request.deadline or math.inf, self.config.request_timeout)
        job = self.jobs.join(client_request)
        with job.subscribe():
            if client_request.stream:
                return await self._stream(request, client_request, job, limit)
            return await run_until_disconnect(request.receive, self._wait(request, client_request, job), limit)

    async def read_file(self, request: Request) -> Response:
        """The image behind a link."""
        if not isinstance(self.links, LocalLinks):
            raise NotFoundError("This server does not serve linked images.")
        query = request.query_params
        stored = await self.links.read(
            request.path_params["name"], query.get("expires", ""), query.get("signature", "")
        )
        headers = {"Cache-Control": f"private, max-age={stored.seconds_left}"}
        return Response(stored.content, media_type=stored.media_type, headers=FILE_HEADERS | headers)

    async def _wait(self, request: Request, client_request: ClientRequest, job: Job) -> Response:
        """The response with all images, once they are generated."""
        images = await job.final_images()
        urls = await self._publish(request, client_request.file_format, images) if client_request.links else None
        headers = {"Server-Timing": responses.server_timing(images), **_job_headers(job)}
        if truncated := responses.truncated(images[0]):
            headers["x-hypergen-prompt-truncated"] = str(truncated)
        return await run_in_thread_if_large(
            lambda: _json(responses.images_response(client_request, images, urls), headers=headers),
            sum(len(encoded.file) for encoded in images),
            quick=_QUICK_BYTES,
        )

    async def _publish(self, request: Request, file_format: FileFormat, images: Sequence[EncodedImage]) -> list[str]:
        base_url = self.config.public_url or str(request.base_url)
        return await asyncio.gather(*(self.links.publish(encoded.file, file_format, base_url) for encoded in images))

    async def _stream(self, request: Request, client_request: ClientRequest, job: Job, limit: float) -> Response:
        """The response that sends each preview and image as an event."""
        heartbeat = min(self.config.heartbeat_interval, (client_request.client.read_timeout or math.inf) / 2)
        stream = EventStream(_frames(client_request, job), heartbeat=heartbeat, limit=limit)
        await stream.wait_for_first_frame(request.receive)
        stream.headers.update(_job_headers(job))
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


async def _or_none(work: Coroutine[Any, Any, T], limit: float) -> T | None:
    with suppress(TimeoutError, HyperGenError):
        return await run_with_timeout(work, limit)
    return None


async def _frames(request: ClientRequest, job: Job) -> AsyncGenerator[bytes, None]:
    previews: Counter[int] = Counter()
    async with aclosing(job.images()) as images:
        async for encoded in images:
            number = previews[encoded.image.index]
            previews[encoded.image.index] += 1
            frame = functools.partial(_frame, request, encoded, number)
            yield await run_in_thread_if_large(frame, len(encoded.file), quick=_QUICK_BYTES)


def _frame(request: ClientRequest, encoded: EncodedImage, number: int) -> bytes:
    """The event for an image, or for its `number`-th preview. Blocks."""
    event = responses.image_event(request, encoded, number)
    return to_frame(event.type, event)


def _job_headers(job: Job) -> dict[str, str]:
    """Headers: the generated sizes if the images sent differ from them; queue position and estimate on arrival."""
    headers = {}
    if sizes := job.request.generated_sizes:
        headers["x-hypergen-generated-size"] = ", ".join(f"{width}x{height}" for width, height in sizes)
    if job.slot is None:
        return headers
    headers["x-hypergen-queue-position"] = str(job.slot.position)
    if job.slot.estimate is not None:
        headers["x-hypergen-estimated-ms"] = str(round(job.slot.estimate * 1000))
    return headers


def _json(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # OpenAI omits unknown optional fields; the health response has them as null.
    content = model.model_dump_json(exclude_none=not isinstance(model, Health))
    return Response(content, status_code=status, headers=headers, media_type="application/json")
