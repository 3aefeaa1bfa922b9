"""Work that somebody waits for: it ends when its client leaves or its time is up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from hypergen_gateway.errors import ClientClosedRequestError, DeadlineExceededError, UnavailableError

T = TypeVar("T")


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], limit: float) -> T:
    """The result of `work`, which is cancelled when the client leaves or `limit` seconds have passed."""
    job = asyncio.ensure_future(work)
    left = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({job, left}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if job.cancelled():  # by nobody here: gRPC says so when its channel is closed
            raise UnavailableError("The server is shutting down.")
        if job.done():
            return job.result()
        if left.done():
            raise ClientClosedRequestError("The client closed the request.")
        raise deadline_exceeded(limit)
    finally:
        await cancel(job, left)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels and waits until all of them have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def deadline_exceeded(limit: float) -> DeadlineExceededError:
    """The error of work that took too long."""
    return DeadlineExceededError(f"The pictures were not ready within {limit:g} seconds.")
