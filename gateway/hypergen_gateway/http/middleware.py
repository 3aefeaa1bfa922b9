"""Middleware for all requests. Pure ASGI, so bodies and responses are streamed through.

From the outside in: trace context; request id, access log and security headers; exception handling; validation and
authorization (see `auth` and `origins`). The limit of a body belongs to its route.
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
from hypergen_gateway.http.auth import PROBE_PATHS
from hypergen_gateway.http.exceptions import error_response, forget_tracebacks, log_exception, to_api_error
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

# Other methods are counted as "other", as clients could otherwise create any number of metric labels.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_MAX_URL_BYTES = 8 << 10
_MAX_HEADERS = 100
_MAX_HEAD_BYTES = 32 << 10
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
# Longest part of a path shown in logs and messages.
_MAX_SHOWN_PATH = 200


class RequestRecord(NamedTuple):
    """A completed request, and the message of its access log line.

    `method` and `route` have few possible values, for metrics; `request_line` has both as sent. `images` and `steps`
    are set for requests that generate images.
    """

    request_id: str
    request_line: str
    method: str
    route: str
    status: int
    seconds: float
    key: str | None = None  # name of the API key, if it has one
    images: int | None = None
    steps: int | None = None

    def __str__(self) -> str:
        key = "" if self.key is None else f" {self.key}"
        return f"{self.request_line} {self.status} {round(self.seconds * 1000)} ms {self.request_id}{key}"

    def fields(self) -> dict[str, str | int]:
        """Fields of a structured log line."""
        fields: dict[str, str | int] = {"method": self.method, "route": self.route}
        fields |= {"status": self.status, "ms": round(self.seconds * 1000)}
        optional = {"key": self.key, "images": self.images, "steps": self.steps}
        return fields | {name: value for name, value in optional.items() if value is not None}


class Observer(Protocol):
    """Receives every completed request."""

    def responded(self, record: RequestRecord) -> None:
        """A request was answered."""
        ...


class Trace:
    """Reads the trace context of a request. `traced` wraps the application to create spans, if tracing is on."""

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
    """Assigns request ids, adds response headers, writes the access log and notifies the observers.

    Security headers are added here, too, as each further middleware costs time. Probes come every few seconds: one is
    logged only if the last one of its path was answered differently.

    `routes` maps endpoints to their paths, with parameters in braces.
    """

    def __init__(self, app: ASGIApp, routes: Mapping[Any, str], observers: Sequence[Observer]) -> None:
        self._app = app
        self._routes = routes
        self._observers = observers
        self._probes: dict[str, int] = {}  # path -> status of the last answer

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
                milliseconds = round((time.perf_counter() - started) * 1000)
                message["headers"] = [
                    *given,
                    *security_headers(given),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % milliseconds),
                ]
            return send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._report(scope, status, time.perf_counter() - started)
            current_request_id.reset(token)

    def _repeats(self, path: str, status: int) -> bool:
        if path not in PROBE_PATHS:
            return False
        last, self._probes[path] = self._probes.get(path), status
        return status == last

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        method, path, state = scope["method"], scope["path"], scope.get("state", {})
        route = self._routes.get(scope.get("endpoint"), "other")
        record = RequestRecord(
            request_id=current_request_id.get(),
            request_line=f"{method} {path if path == route else _shown(path)}",
            method=method if method in _METHODS else "other",
            route=route,
            status=status,
            seconds=seconds,
            key=state.get("key_name"),
            **state.get("generation", {}),
        )
        access_logger.log(logging.DEBUG if self._repeats(path, status) else logging.INFO, record)
        for observer in self._observers:
            observer.responded(record)


class ExceptionMiddleware:
    """Turns exceptions into error responses in OpenAI's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response_started = False

        def send_and_note(message: Message) -> Awaitable[None]:
            nonlocal response_started
            response_started = True
            return send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:  # uvicorn's graceful shutdown has timed out
            if not response_started:
                await error_response(UnavailableError("The server is shutting down."))(scope, receive, send)
            raise
        except Exception as error:
            if response_started:
                raise
            await _to_response(error, scope)(scope, receive, send)


class RequestValidation:
    """Runs `checks` on each request before it is routed; they raise an error to reject it."""

    def __init__(self, app: ASGIApp, checks: Sequence[Callable[[Scope], None]]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for check in self._checks:
                check(scope)
        await self._app(scope, receive, send)


def check_head(scope: Scope) -> None:
    """Reject oversized heads, and heads with an ambiguous body length (request smuggling).

    A proxy that trusts Content-Length while this server trusts Transfer-Encoding would see another request in the body.
    """
    if len(scope["path"]) + len(scope["query_string"]) > _MAX_URL_BYTES:
        raise AddressTooLongError(f"The URL is too long: at most {_MAX_URL_BYTES:,} bytes are accepted.")
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    framings = [value.lower() for name, value in scope["headers"] if name in _FRAMING]
    if len(scope["headers"]) > _MAX_HEADERS or size > _MAX_HEAD_BYTES:
        raise HeadTooLargeError
    if len(framings) > 1 or not all(framing == b"chunked" or framing.isdigit() for framing in framings):
        raise MalformedRequestError("A body must have one Content-Length, or one Transfer-Encoding: chunked.")


class BodyLimit:
    """Rejects bodies above the limit: by Content-Length before reading, else as soon as too much is received.

    Forms have a higher limit, as their files are spooled to disk.
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
    return BodyTooLargeError(f"The body is too large: at most {limit:,} bytes are accepted.")


def _to_response(error: Exception, scope: Scope) -> Response:
    """The response to an exception. Starlette raises 404 and 405; OPTIONS gets the allowed methods."""
    method = scope["method"]
    allow = (error.headers or {}).get("Allow") if isinstance(error, HTTPException) else None
    if allow is not None and method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": f"{allow}, OPTIONS"})
    api_error: HyperGenError
    if allow is not None:
        api_error = MethodNotAllowedError(f"The method {method} is not allowed here. Allowed: {allow}.", allow)
    elif isinstance(error, HTTPException) and error.status_code == 404:
        path = scope["path"]
        api_error = NotFoundError(f"Not found: {method} {_shown(path)}.{hint_for(path)}")
    else:
        api_error = to_api_error(error)
    log_exception(api_error, error)
    forget_tracebacks(error)
    return error_response(api_error)


def _shown(path: str) -> str:
    """A path, escaped and shortened for logs and messages."""
    shown = quote(path[:_MAX_SHOWN_PATH], safe="/:@")
    return shown if len(path) <= _MAX_SHOWN_PATH else f"{shown}…"
