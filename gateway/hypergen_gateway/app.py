"""The ASGI application: routes, middleware and lifespan, for a configuration and a backend."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hypergen_gateway.api.routes import Endpoints
from hypergen_gateway.concurrency import cancel
from hypergen_gateway.config import Config
from hypergen_gateway.generation.admission import Admission
from hypergen_gateway.generation.backend import Backend
from hypergen_gateway.generation.jobs import Jobs, RetentionPolicy
from hypergen_gateway.generation.service import ImageService
from hypergen_gateway.http.auth import METRICS_PATH, PROBE_PATHS, ApiKey
from hypergen_gateway.http.middleware import ExceptionMiddleware, RequestLog, RequestValidation, Trace, check_head
from hypergen_gateway.http.origins import OriginCheck, cors
from hypergen_gateway.http.paths import CanonicalPath
from hypergen_gateway.http.protocol import ON_REJECTED
from hypergen_gateway.observability.metrics import Metrics
from hypergen_gateway.playground import FILES_PREFIX, PAGE_PATH
from hypergen_gateway.storage.local import FILES_PATH, Links, LocalLinks

if TYPE_CHECKING:  # OpenTelemetry is an optional dependency
    from hypergen_gateway.observability.tracing import Tracing

logger = logging.getLogger(__name__)

# Probes have no key, users enter theirs on the playground's page, and the API's description says how to send one.
_OPEN_PATHS = PROBE_PATHS | {"/openapi.json", "/docs", PAGE_PATH}
# A link is signed, so it needs no key; the playground's files are public.
_OPEN_PREFIXES = (f"{FILES_PATH}/", FILES_PREFIX)


def create_app(
    config: Config,
    backend: Backend,
    tracing: Tracing | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Starlette:
    """The gateway's ASGI application. It closes the backend and tracing at shutdown.

    `clock` returns seconds; the estimates of when images will be ready are made from it.

    Raises:
        BadKeysError: the file of API keys is unreadable or malformed.
    """
    keys = config.keys
    if "*" in config.cors_origins and not keys:
        logger.warning("Every website may use this server through its visitors' browsers, and it asks for no key")
    admission = Admission(config.max_queue_size, clock)
    metrics = Metrics(admission)
    retention = RetentionPolicy(grace=config.retry_grace, seconds=config.retry_seconds, nbytes=config.retry_bytes)
    observers: list[Metrics | Tracing] = [metrics] if tracing is None else [metrics, tracing]
    jobs = Jobs(ImageService(backend, admission, observers), retention, metrics.joined)
    links = _links(config)
    endpoints = Endpoints(config, backend, admission, jobs, links, metrics)
    routes = endpoints.routes()
    paths = {route.endpoint: route.path for route in routes if isinstance(route, Route)}
    open_paths = _OPEN_PATHS if config.metrics_need_key else _OPEN_PATHS | {METRICS_PATH}

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        tidying = asyncio.create_task(links.run())
        try:
            yield {ON_REJECTED: metrics.rejected_by_protocol}
        finally:
            await cancel(tidying)
            await jobs.close()
            await backend.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    authorize = (
        ApiKey(keys, open_paths, _OPEN_PREFIXES) if keys else OriginCheck(config.cors_origins, config.public_url)
    )
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(CanonicalPath),
            Middleware(Trace) if tracing is None else Middleware(Trace, traced=tracing.middleware),
            Middleware(RequestLog, routes=paths, observers=observers),
            *cors(config.cors_origins),
            Middleware(ExceptionMiddleware),
            Middleware(RequestValidation, checks=(check_head, authorize)),
        ],
        exception_handlers={HTTPException: _reraise},
        lifespan=lifespan,
    )
    # A redirect of "/v1/models/" would be the only response that is not in OpenAI's format.
    app.router.redirect_slashes = False
    return app


async def _reraise(_: Request, error: Exception) -> Response:
    """Leaves the router's 404 and 405 to `ExceptionMiddleware`; Starlette would respond in plain text."""
    raise error


def _links(config: Config) -> Links:
    if config.link_bucket is not None:
        # Imported here, as boto3 is an optional dependency, needed only for a bucket.
        from hypergen_gateway.storage.s3 import S3Links

        return S3Links(config.link_bucket, lifetime=config.link_lifetime)
    return LocalLinks(config.link_folder, lifetime=config.link_lifetime, secret=config.link_secret)
