"""The application as a value: routes, middleware and lifetime around a configuration and a backend."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from hypergen_gateway.admission import Admission
from hypergen_gateway.config import Config
from hypergen_gateway.endpoints import Endpoints
from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.generation import Backend
from hypergen_gateway.middleware import ApiKey, BodyLimit, Errors, RequestLog, answer_http_exception

logger = logging.getLogger(__name__)


def create_app(config: Config, backend: Backend) -> Starlette:
    """The gateway's ASGI application. It closes the backend when it shuts down."""
    endpoints = Endpoints(config, backend, Admission(config.max_queue_size))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await _read_description(backend)
        try:
            yield
        finally:
            await backend.close()

    app = Starlette(
        routes=endpoints.routes(),
        middleware=[
            Middleware(RequestLog),
            Middleware(Errors),
            Middleware(ApiKey, api_key=config.api_key),
            Middleware(BodyLimit, max_bytes=config.max_body_bytes),
        ],
        exception_handlers={HTTPException: answer_http_exception},
        lifespan=lifespan,
    )
    # A redirect of "/v1/models/" would be the one answer that is not OpenAI's.
    app.router.redirect_slashes = False
    return app


async def _read_description(backend: Backend) -> None:
    """Read early, so that the model is known should Triton be away later. Not being there yet is no reason to stop."""
    try:
        await backend.describe()
    except HyperGenError as error:
        logger.warning("Triton is not ready yet: %s", error)
