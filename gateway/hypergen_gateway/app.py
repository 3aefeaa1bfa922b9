"""The application as a value: routes, middleware and lifetime around a configuration and a backend."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from hypergen_gateway.admission import Admission
from hypergen_gateway.config import Config
from hypergen_gateway.connection import cancel
from hypergen_gateway.drawing import Studio
from hypergen_gateway.endpoints import Endpoints
from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.generation import Backend
from hypergen_gateway.jobs import Jobs, Keeping
from hypergen_gateway.links import Links, LocalLinks
from hypergen_gateway.middleware import ApiKey, Errors, RequestLog, answer_http_exception

logger = logging.getLogger(__name__)


def create_app(config: Config, backend: Backend) -> Starlette:
    """The gateway's ASGI application. It closes the backend when it shuts down."""
    admission = Admission(config.max_queue_size)
    keeping = Keeping(grace=config.retry_grace, seconds=config.retry_seconds, nbytes=config.retry_bytes)
    jobs, links = Jobs(keeping, lambda _: None), _links(config)
    endpoints = Endpoints(config, backend, admission, Studio(backend, admission), jobs, links)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(links.run())
        await _read_description(backend)
        try:
            yield
        finally:
            await cancel(tidying)
            await jobs.close()
            await backend.close()

    app = Starlette(
        routes=endpoints.routes(),
        middleware=[
            Middleware(RequestLog),
            Middleware(Errors),
            Middleware(ApiKey, api_key=config.api_key),
        ],
        exception_handlers={HTTPException: answer_http_exception},
        lifespan=lifespan,
    )
    # A redirect of "/v1/models/" would be the one answer that is not OpenAI's.
    app.router.redirect_slashes = False
    return app


def _links(config: Config) -> Links:
    if config.link_bucket is not None:
        # Imported here: a gateway that keeps its pictures itself is installed without boto3.
        from hypergen_gateway.s3 import S3Links

        return S3Links(config.link_bucket, lifetime=config.link_lifetime)
    return LocalLinks(config.link_folder, lifetime=config.link_lifetime, secret=config.link_secret)


async def _read_description(backend: Backend) -> None:
    """Read early, so that the model is known should Triton be away later. Not being there yet is no reason to stop."""
    try:
        await backend.describe()
    except HyperGenError as error:
        logger.warning("Triton is not ready yet: %s", error)
