"""Running work until the client disconnects or a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from hypergen_gateway.concurrency import cancel
from hypergen_gateway.errors import ClientClosedRequestError, DeadlineExceededError, UnavailableError

T = TypeVar("T")


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], limit: float) -> T:
    """The result of `work`, which is cancelled when the client disconnects or after `limit` seconds."""
    job = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({job, disconnected}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if job.cancelled():  # by gRPC, when its channel is closed
            raise UnavailableError("The server is shutting down.")
        if job.done():
            return job.result()
        if disconnected.done():
            raise ClientClosedRequestError("The client closed the request.")
        raise deadline_exceeded(limit)
    finally:
        await cancel(job, disconnected)


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


def deadline_exceeded(limit: float) -> DeadlineExceededError:
    """The error for work that exceeds its time limit."""
    return DeadlineExceededError(f"The images were not ready within {limit:g} seconds.")
