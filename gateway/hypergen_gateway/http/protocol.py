"""Connection limits and malformed-request handling on top of uvicorn's httptools protocol.

uvicorn limits neither the number of connections nor the size and duration of request heads, and answers malformed
requests in plain text.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from hypergen_gateway.errors import (
    HeadTooLargeError,
    HyperGenError,
    InvalidRequestError,
    RequestTimeoutError,
    UnavailableError,
)
from hypergen_gateway.http.auth import PROBE_PATHS
from hypergen_gateway.http.exceptions import error_response
from hypergen_gateway.http.paths import canonical_path
from hypergen_gateway.http.proxies import TrustedProxies

logger = logging.getLogger(__name__)

# Key of the lifespan state for a callback that receives the status of each request rejected before the application.
ON_REJECTED = "on_rejected"

# Far more than the requests that generate images at once, as idle connections count, too.
MAX_CONNECTIONS = 1000
# Connections above the limit that get a 503; further ones are closed.
MAX_REJECTIONS = 200
# Seconds that an idle connection stays open: longer than proxies reuse theirs, so that none is used as it closes.
KEEP_ALIVE_SECONDS = 75.0
# Seconds to receive the head of a request, which usually is one packet.
HEAD_SECONDS = 10.0
# Seconds to receive the rest of a body after its request was rejected.
REST_SECONDS = 5.0
# Seconds that a client may send on after the last response: closing would reset the connection, which can cost it the
# response (RFC 9112, section 9.6).
LINGER_SECONDS = 2.0
# File descriptors: one per connection, and some for forms, gRPC and the models.
OPEN_FILES = 8192
# Connections accepted in one iteration of the event loop; each takes a file descriptor even if it is rejected.
_ACCEPTS_PER_ITERATION = 64
_LISTEN_BACKLOG = 2048
_NO_FILE = (errno.EMFILE, errno.ENFILE)
# Largest head, chunk header or trailer; unparsed input above it is rejected.
MAX_HEAD_BYTES = 64 << 10

# HTTP version and number of Host headers.
_WELL_FORMED = frozenset({("1.0", 0), ("1.0", 1), ("1.1", 1)})


class Connections:
    """The limit of connections, and the idle ones: the longest idle one is closed to make room for a new one."""

    def __init__(self, most: int, rejections: int) -> None:
        """`rejections` more connections get a 503."""
        self.most = most
        self.rejections = rejections
        self._idle: dict[LimitedHTTPProtocol, None] = {}  # longest idle first

    @classmethod
    def for_files(cls, files: int) -> Connections:
        """A limit for a process that may open `files` files, which leaves some for uploads and gRPC."""
        files = OPEN_FILES if files == resource.RLIM_INFINITY else files
        return cls(most=min(MAX_CONNECTIONS, files // 2), rejections=min(MAX_REJECTIONS, files // 8))

    def update(self, connection: LimitedHTTPProtocol, *, is_idle: bool) -> None:
        """Record whether a connection is idle."""
        if is_idle:
            self._idle.setdefault(connection)
        else:
            self._idle.pop(connection, None)

    def make_room(self) -> bool:
        """Close the longest idle connection. False if none is idle with an empty write buffer."""
        for connection in self._idle:
            if connection.transport.get_write_buffer_size() == 0:
                del self._idle[connection]
                connection.transport.close()
                return True
        return False


class LimitedHTTPProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits above, and errors in OpenAI's shape for requests that it rejects itself."""

    def __init__(self, *arguments: Any, limit: Connections, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._limit = limit
        self._timer: asyncio.TimerHandle | None = None
        self._unparsed = 0  # bytes received since the parser last made progress
        self._in_head = self._in_body = False
        self._ignores_input = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the head timeout. Above the limit, close an idle connection or answer this one with a 503."""
        super().connection_made(transport)
        self.transport = CoalescingTransport(transport, self.loop, self._lingers)  # type: ignore[assignment]
        surplus = len(self.connections) - self._limit.most
        if surplus > 0 and not self._limit.make_room():
            if surplus > self._limit.rejections:
                transport.abort()
            self.app = _serve_probes_only(self.app, self._report)
        self._limit.update(self, is_idle=True)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        self._limit.update(self, is_idle=False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse `data`, and limit the time and size of an incomplete head."""
        if self._ignores_input or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._unparsed += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:  # not logged, as clients could fill the log with malformed data
            self._reject(InvalidRequestError("Invalid HTTP request received."))
        if self._unparsed > MAX_HEAD_BYTES and not self._ignores_input:
            self._reject(HeadTooLargeError())
        if self._timer is None and not self._ignores_input and not self._is_at_work():
            self._await_head()
        self._limit.update(self, is_idle=self._is_idle())

    def _feed(self, data: bytes) -> None:
        """Parse `data`, ignoring requests to upgrade, as RFC 9110, section 7.8 allows.

        httptools stops after the head of an upgrade request and would parse its body as the next request, so the head
        is parsed again without the header.
        """
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                (offset,) = upgrade.args
                data = self._head_without_upgrade() + data[offset:]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return line + b"".join(b"%s: %s\r\n" % each for each in self.headers if each[0] != b"upgrade") + b"\r\n"

    def on_message_begin(self) -> None:
        """The first byte of a head was received."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools reports trailers, too; they are ignored."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete. Exceptions raised here become a 400."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("CONNECT is for proxies")
        if self.parser.should_upgrade():
            return  # parsed again without the header
        version, names = self.parser.get_http_version(), [name for name, _ in self.headers]
        if (version, names.count(b"host")) not in _WELL_FORMED:
            raise ValueError("unsupported version, or not exactly one Host")
        if version == "1.0":
            if b"transfer-encoding" in names:
                raise ValueError("HTTP/1.0 has no chunked encoding")
            self.expect_100_continue = False
        super().on_headers_complete()
        self._stop_timer()
        self._unparsed, self._in_head, self._in_body = 0, False, True

    def on_body(self, body: bytes) -> None:
        """A part of the body was received."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self.parser.should_upgrade():
            return
        self._unparsed, self._in_body = 0, False
        if not self.parser.should_keep_alive():  # a trailer can end it: nothing more is parsed
            self.cycle.keep_alive = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The response is sent. A client that is still sending its body may do so for `REST_SECONDS`."""
        if self._in_body and not self.pipeline:
            self._restart_timer(REST_SECONDS, self.transport.close)
        elif self._in_head and not self.pipeline and not self.transport.is_closing():
            self._await_head()
        super().on_response_complete()
        self._limit.update(self, is_idle=self._is_idle())

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.waiting_for_100_continue or cycle.scope["http_version"] == "1.0":
            app = functools.partial(_with_framing, app, cycle)
        super()._start_asgi_task(cycle, app)

    def _lingers(self) -> bool:
        """Whether the client may be sending more than has been read."""
        return self._in_body or self._ignores_input

    def _is_at_work(self) -> bool:
        return self._in_body or not (self.cycle is None or self.cycle.response_complete)

    def _is_idle(self) -> bool:
        return not (self._in_head or self._is_at_work() or self.transport.is_closing())

    def _reject(self, error: HyperGenError) -> None:
        """Close the connection after the responses to earlier requests, with this error unless a response has begun."""
        self._report(error.status)
        self._stop_timer()
        self._ignores_input = True
        if self.pipeline or (self._is_at_work() and not self._in_body):
            if self._in_body:  # the last request in the queue is the malformed one
                response: Any = error_response(error)
                self.pipeline[0] = (self.cycle, response)
            self.cycle.keep_alive = False
            return
        if not (self._in_body and self.cycle.response_started):
            response = error_response(error)
            lines = [STATUS_LINE[error.status], b"connection: close\r\n"]
            lines += [b"%s: %s\r\n" % header for header in response.raw_headers if header[0] != b"connection"]
            self.transport.write(b"".join([*lines, b"\r\n", bytes(response.body)]))
        if self._in_body:  # the application is waiting for more of the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _report(self, status: int) -> None:
        on_rejected: Callable[[int], None] | None = self.app_state.get(ON_REJECTED)
        if on_rejected is not None:
            on_rejected(status)

    def _await_head(self) -> None:
        self._restart_timer(HEAD_SECONDS, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        """Answer a client that has sent a part of a head; close the connection of one that has sent nothing."""
        if self._in_head:
            self._reject(RequestTimeoutError("The request's headers did not arrive in time."))
        else:
            self.transport.abort()

    def _restart_timer(self, seconds: float, at_end: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, at_end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class CoalescingTransport:
    """A transport that sends everything written in one iteration of the event loop at once.

    Head and body of a response become one packet; separately, each would cost a system call and wake the client.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, lingers: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._lingers = lingers
        self._is_half_closed = False
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this iteration, or at once if large, for flow control."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        if len(data) > MAX_HEAD_BYTES:
            self._flush()

    def close(self) -> None:
        """Close the connection after everything is sent, and the client may send on for `LINGER_SECONDS`."""
        self._flush()
        if self._is_half_closed or not self._lingers():
            self._transport.close()
        elif not self._transport.is_closing():
            self._is_half_closed = True
            with contextlib.suppress(OSError):  # the client has gone
                self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(LINGER_SECONDS, self._end_lingering)

    def is_closing(self) -> bool:
        """Whether it is being closed, and whatever is received discarded."""
        return self._is_half_closed or self._transport.is_closing()

    def _end_lingering(self, unsent_before: int | None = None) -> None:
        unsent = self._transport.get_write_buffer_size()
        if unsent and unsent != unsent_before:  # the client is still reading
            self._loop.call_later(LINGER_SECONDS, self._end_lingering, unsent)
        else:
            self._transport.abort()

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def raise_file_limit() -> None:
    """Raise the limit of open files as far as allowed, up to what the connections and their uploads need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft not in (resource.RLIM_INFINITY, allowed) and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class Listener(socket.socket):
    """A listening socket that pauses accepting when the process is out of file descriptors.

    asyncio pauses, too, but only after as many attempts as its backlog, each with a traceback.
    """

    _resumes = 0.0

    def listen(self, backlog: int = 0, /) -> None:
        """Use a longer backlog than the one asyncio passes, which is also the number of accepts per iteration."""
        super().listen(max(backlog, _LISTEN_BACKLOG))

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises `BlockingIOError` if there is none, or during a pause."""
        if time.monotonic() < self._resumes:
            raise BlockingIOError
        try:
            return super().accept()
        except OSError as error:
            if error.errno in _NO_FILE:
                self._resumes = time.monotonic() + 0.5  # shorter than the pause of asyncio
            raise


class AcceptErrors:
    """An event loop exception handler that logs running out of file descriptors once a minute, not every second."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an unhandled exception."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _NO_FILE and "accept" in context["message"]):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + 60
            logger.warning("No connection can be accepted: %s", error.strerror)


def make_uvicorn_config(
    app: Any, *, keep_alive: float = KEEP_ALIVE_SECONDS, connections: Connections | None = None, **settings: Any
) -> uvicorn.Config:
    """uvicorn's configuration for an application with `LimitedHTTPProtocol` and without uvicorn's own logs.

    The default limit of connections follows from the process's limit of open files.
    """
    limit = connections or Connections.for_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    protocol: Any = functools.partial(LimitedHTTPProtocol, limit=limit)
    return uvicorn.Config(
        TrustedProxies(app),
        proxy_headers=False,
        http=protocol,
        ws="none",
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # seconds of asyncio's clock
        backlog=_ACCEPTS_PER_ITERATION,
        log_config=None,
        access_log=False,
        server_header=False,
        **settings,
    )


async def _with_framing(app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send) -> None:
    """Run `app`, with a response that ends in a way that the client understands.

    HTTP/1.0 has no chunked encoding: a response of unknown length ends with the connection. So does a response sent
    instead of "100 Continue", as the client may or may not send the body.
    """
    has_unknown_length = False

    def send_with_framing(message: Message) -> Awaitable[None]:
        nonlocal has_unknown_length
        if message["type"] == "http.response.start":
            cycle.keep_alive &= not cycle.waiting_for_100_continue
            lengths = [value for name, value in message["headers"] if name == b"content-length"]
            has_unknown_length = scope["http_version"] == "1.0" and not lengths
            if has_unknown_length:
                cycle.chunked_encoding = False
        elif has_unknown_length:
            cycle.expected_content_length = len(message.get("body", b""))
        return send(message)

    await app(scope, receive, send_with_framing)


def _serve_probes_only(app: ASGIApp, on_rejected: Callable[[int], None]) -> ASGIApp:
    """Serve health checks, as an orchestrator would otherwise restart the server; reject everything else."""

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        if canonical_path(scope.get("path", "")) in PROBE_PATHS:
            await app(scope, receive, send)
            return
        rejection = error_response(UnavailableError("The server has too many connections."))
        rejection.headers["Connection"] = "close"
        on_rejected(rejection.status_code)
        await rejection(scope, receive, send)

    return busy
