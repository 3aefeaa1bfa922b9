"""Server-sent events as OpenAI's clients read them.

OpenAI's Python client fails on an event without data and on any `id:`, and takes an event of an unknown type for an
image. Therefore only images, at most one error, and comments are sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hypergen_gateway.concurrency import cancel, run_with_timeout
from hypergen_gateway.errors import ClientClosedRequestError, HyperGenError, UnavailableError
from hypergen_gateway.http.disconnect import deadline_exceeded, wait_for_disconnect
from hypergen_gateway.http.exceptions import forget_tracebacks, log_exception, to_api_error

# A comment: clients skip it, and it keeps proxies from closing an idle connection.
HEARTBEAT = b": ping\n\n"
_HEADERS = {
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # nginx would buffer the events
}


def to_frame(type_: str, event: BaseModel) -> bytes:
    """An event as it is sent."""
    return f"event: {type_}\ndata: {event.model_dump_json(exclude_none=True)}\n\n".encode()


def to_error_frame(error: HyperGenError) -> bytes:
    """An error as it is sent: both of OpenAI's clients raise it."""
    return f"data: {json.dumps(error.body)}\n\n".encode()


class EventStream(Response):
    """A response that sends frames as they are produced, for at most `limit` seconds.

    A heartbeat is sent after every `heartbeat` seconds without a frame. A client that reads slowly does not hold up
    the producer, since a request has few frames. A disconnect cancels the producer, and an exception ends the stream
    with an error.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], *, heartbeat: float, limit: float) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._heartbeat = heartbeat
        self._limit = limit
        self._deadline = time.monotonic() + limit
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._first: bytes | None = None
        self._producer = asyncio.create_task(self._produce(frames))

    async def wait_for_first_frame(self, receive: Receive) -> None:
        """Waits until there is something to send, if only a heartbeat. Errors until then are raised."""
        disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
        first_frame = asyncio.ensure_future(self._next())
        try:
            await asyncio.wait({disconnected, first_frame}, return_when=asyncio.FIRST_COMPLETED)
            if not first_frame.done():
                raise ClientClosedRequestError("The client closed the request.")
            self._first = first_frame.result()
        except BaseException:
            await cancel(self._producer)
            raise
        finally:
            await cancel(disconnected, first_frame)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Sends the response. Called once, after `wait_for_first_frame`."""
        disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
        sending = asyncio.ensure_future(self._send_all(send))
        try:
            await asyncio.wait({disconnected, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except asyncio.CancelledError:  # uvicorn's graceful shutdown has timed out
            await cancel(sending)
            await _send_last(send, to_error_frame(UnavailableError("The server is shutting down.")))
            raise
        finally:
            await cancel(disconnected, sending, self._producer)

    async def _produce(self, frames: AsyncGenerator[bytes, None]) -> None:
        try:
            async with aclosing(frames):
                async for frame in frames:
                    self._queue.put_nowait(frame)
        finally:
            self._queue.put_nowait(None)

    async def _next(self) -> bytes | None:
        """The next frame or a heartbeat; None at the end. The producer's error is raised after its last frame."""
        timeout = min(self._heartbeat, self._deadline - time.monotonic())
        try:
            frame = await run_with_timeout(self._queue.get(), max(timeout, 0))
        except TimeoutError:
            if time.monotonic() >= self._deadline:
                raise deadline_exceeded(self._limit) from None
            return HEARTBEAT
        if frame is None:
            await asyncio.wait({self._producer})
            if self._producer.cancelled():  # not by this class, but by gRPC when its channel is closed
                raise UnavailableError("The server is shutting down.")
            self._producer.result()
        return frame

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        frame = self._first
        while frame is not None:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            try:
                frame = await self._next()
            except Exception as error:
                api_error = to_api_error(error)
                log_exception(api_error, error)
                forget_tracebacks(error)
                await _send_last(send, to_error_frame(api_error))
                return
        await _send_last(send, b"")


async def _send_last(send: Send, frame: bytes) -> None:
    await send({"type": "http.response.body", "body": frame, "more_body": False})
