"""What happens to every request, whatever it asks for. Pure ASGI, so bodies and responses stream through untouched.

From the outside in: trace; request id, access log and what browsers are told; errors; who may ask (in `browsers` and
`access`); a body's limit is its route's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen_gateway.errors import (
    AddressTooLongError,
    BodyTooLargeError,
    HeadTooLargeError,
    HyperGenError,
    MalformedRequestError,
    MethodNotAllowedError,
    NotFoundError,
    UnavailableError,
)
from hypergen_gateway.http.exceptions import error_response, log_exception, to_api_error
from hypergen_gateway.http.origins import security_headers
from hypergen_gateway.http.paths import hint_for
from hypergen_gateway.http.request_id import (
    accept_or_create,
    current_request_id,
    current_trace,
    find_header,
    read_trace,
)

access_logger = logging.getLogger("hypergen_gateway.access")

# Anything else that a client may write there would be one more label of a metric.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_MAX_ADDRESS_BYTES = 8 << 10
_MAX_HEADERS = 100
_MAX_HEAD_BYTES = 32 << 10
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Of a path that may be any text, in logs and messages.
_SHOWN_PATH = 200


class RequestRecord(NamedTuple):
    """A request that was answered. What was drawn is known where it was tried.

    `method` and `route` are among few; `asked` has both as they were, to be shown. It is its own line in the log.
    """

    request_id: str
    asked: str
    method: str
    route: str
    status: int
    seconds: float
    key: str | None = None  # the name of the API key, if it has one
    images: int | None = None
    steps: int | None = None

    def __str__(self) -> str:
        key = "" if self.key is None else f" {self.key}"
        return f"{self.asked} {self.status} {round(self.seconds * 1000)} ms {self.request_id}{key}"

    def fields(self) -> dict[str, str | int]:
        """What a structured log says of it."""
        told: dict[str, str | int] = {"method": self.method, "route": self.route}
        told |= {"status": self.status, "ms": round(self.seconds * 1000)}
        more = {"key": self.key, "images": self.images, "steps": self.steps}
        return told | {name: value for name, value in more.items() if value is not None}


class Observer(Protocol):
    """Is told of every request."""

    def served(self, served: RequestRecord) -> None:
        """It was answered."""
        ...


class Trace:
    """Takes up the trace that a client's request belongs to; `traced` makes a span of it where traces are wanted."""

    def __init__(self, app: ASGIApp, traced: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> None:
        self._app = traced(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = read_trace(scope["headers"]) if scope["type"] == "http" else {}
        token = current_trace.set(given)
        try:
            await self._app(scope, receive, send)
        finally:
            current_trace.reset(token)


class RequestLog:
    """Gives every request an id, sends it back with the time taken, writes one line to the log and tells the observers.

    What browsers need to be told is added with it, as every layer around an answer takes its time.

    `routes` names the path of each endpoint, with what varies in braces.
    """

    def __init__(self, app: ASGIApp, routes: Mapping[Any, str], observers: Sequence[Observer]) -> None:
        self._app = app
        self._routes = routes
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = accept_or_create(find_header(scope["headers"], b"x-request-id"))
        token = current_request_id.set(request_id)
        started = time.perf_counter()
        status = 500

        def send_with_headers(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message.get("headers", ())
                message["headers"] = [
                    *given,
                    *security_headers(given),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % _milliseconds_since(started)),
                ]
            return send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._tell(scope, status, time.perf_counter() - started)
            current_request_id.reset(token)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        method, path, state = scope["method"], scope["path"], scope.get("state", {})
        route = self._routes.get(scope.get("endpoint"), "other")
        served = RequestRecord(
            request_id=current_request_id.get(),
            asked=f"{method} {path if path == route else _shown(path)}",
            method=method if method in _METHODS else "other",
            route=route,
            status=status,
            seconds=seconds,
            key=state.get("key_name"),
            **state.get("drawn", {}),
        )
        _log(served)
        for observer in self._observers:
            observer.served(served)


def _log(served: RequestRecord) -> None:
    """The line of a request. It tells of no place in the code, so none is looked for."""
    if access_logger.isEnabledFor(logging.INFO):
        access_logger.handle(access_logger.makeRecord(access_logger.name, logging.INFO, "", 0, served, (), None))


class Errors:
    """Answers every error that anything inside raises, in OpenAI's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response_started = False

        def watched_send(message: Message) -> Awaitable[None]:
            nonlocal response_started
            response_started = True
            return send(message)

        try:
            await self._app(scope, receive, watched_send)
        except asyncio.CancelledError:  # uvicorn's patience with a running request has ended
            if not response_started:
                await error_response(UnavailableError("The server is shutting down."))(scope, receive, send)
            raise
        except Exception as error:
            if response_started:
                raise
            await _answer_to(error, scope)(scope, receive, send)


class RequestValidation:
    """Lets no request in to which one of `checks` has an objection, which it raises."""

    def __init__(self, app: ASGIApp, checks: Sequence[Callable[[Scope], None]]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for check in self._checks:
                check(scope)
        await self._app(scope, receive, send)


def check_head(scope: Scope) -> None:
    """Refuses heads that no client needs, and those that leave in doubt where the body ends.

    A proxy that believes the length, where we believe the encoding, would take the rest for another request.
    """
    if len(scope["path"]) + len(scope["query_string"]) > _MAX_ADDRESS_BYTES:
        raise AddressTooLongError(f"The address is too long: at most {_MAX_ADDRESS_BYTES:,} bytes are read.")
    size, framings = 0, []
    for name, value in scope["headers"]:  # one loop, as every request comes by
        size += len(name) + len(value)
        if name in _FRAMING:
            framings.append(value.lower())
    if len(scope["headers"]) > _MAX_HEADERS or size > _MAX_HEAD_BYTES:
        raise HeadTooLargeError
    if len(framings) > 1 or not all(framing == b"chunked" or framing.isdigit() for framing in framings):
        raise MalformedRequestError("A body has one Content-Length, or one Transfer-Encoding, which is 'chunked'.")


class BodyLimit:
    """Refuses a body above the limit: by its declared length before reading, else as soon as it goes over.

    A form may be larger than other bodies, as its files need not stay in memory.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_form_bytes: int | None = None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_form_bytes = max_form_bytes or max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        limit = self._max_form_bytes if is_form else self._max_bytes
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise _too_large(limit)
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, limited_receive, send)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is too large: at most {limit:,} bytes are read.")


def _answer_to(error: Exception, scope: Scope) -> Response:
    """Starlette's own errors are no such route, no such method. OPTIONS is told the methods that there are."""
    method = scope["method"]
    allow = (error.headers or {}).get("Allow") if isinstance(error, HTTPException) else None
    if allow is not None and method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": f"{allow}, OPTIONS"})
    ours: HyperGenError
    if allow is not None:
        ours = MethodNotAllowedError(f"The method {method} is not allowed here. Allowed: {allow}.", allow)
    elif isinstance(error, HTTPException) and error.status_code == 404:
        path = scope["path"]
        ours = NotFoundError(f"There is no {method} {_shown(path)} here.{hint_for(path)}")
    else:
        ours = to_api_error(error)
    log_exception(ours, error)
    return error_response(ours)


def _shown(path: str) -> str:
    """A path that cannot be taken for anything else, in a length that bears repeating."""
    shown = quote(path[:_SHOWN_PATH], safe="/:@")
    return shown if len(path) <= _SHOWN_PATH else f"{shown}…"


def _milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
