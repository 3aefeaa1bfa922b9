"""How many connections there may be, how long they may say nothing, and what is answered to what is no HTTP.

Knows uvicorn's protocol and httptools under it, which bound neither number nor size nor time, and answer in plain text.
"""

from __future__ import annotations

import asyncio
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

# What an application puts into its lifespan's state to be told the statuses of requests that it never hears of.
ON_REJECTED = "tell_unheard"

# Far more than are drawn for at once, as idle ones count.
MAX_CONNECTIONS = 1000
# Those above it are told so, if there are not too many of them either.
MAX_REFUSALS = 200
# Seconds that an idle connection stays open: longer than proxies keep theirs, so that none is used as it closes.
KEEP_ALIVE_SECONDS = 75.0
# Seconds for the head of a request: one packet, of any client that means well.
HEAD_SECONDS = 10.0
# Seconds that the rest of a body may still come after its request was refused.
REST_SECONDS = 5.0
# Of each connection one, and some of each form and of gRPC and the models.
OPEN_FILES = 8192
# Each connection that is accepted in one turn of the loop has a file, whatever becomes of it.
_ACCEPTED_AT_ONCE = 64
_WAITING_TO_BE_ACCEPTED = 2048
_NO_FILE = (errno.EMFILE, errno.ENFILE)
# What is still no part of a request then is refused: a head, a chunk's own or a trailer that does not end.
MAX_HEAD_BYTES = 64 << 10

# The version, and how often Host is there.
_WELL_FORMED = frozenset({("1.0", 0), ("1.0", 1), ("1.1", 1)})


class Connections:
    """How many connections a server has at most, and which of them wait for a request: the idlest makes room."""

    def __init__(self, most: int, refusals: int) -> None:
        """`refusals` more are told that there are too many."""
        self.most = most
        self.refusals = refusals
        self._idle: dict[LimitedHTTPProtocol, None] = {}  # the idlest first

    @classmethod
    def for_files(cls, files: int) -> Connections:
        """As many as leave files for what comes with requests, where so many files may be open."""
        files = OPEN_FILES if files == resource.RLIM_INFINITY else files
        return cls(most=min(MAX_CONNECTIONS, files // 2), refusals=min(MAX_REFUSALS, files // 8))

    def note(self, connection: LimitedHTTPProtocol, *, is_idle: bool) -> None:
        """Whether a connection waits for a request."""
        if is_idle:
            self._idle.setdefault(connection)
        else:
            self._idle.pop(connection, None)

    def make_room(self) -> bool:
        """Closes the connection that has waited longest; False where none waits that has sent all that it was given."""
        for connection in self._idle:
            if connection.transport.get_write_buffer_size() == 0:
                del self._idle[connection]
                connection.transport.close()
                return True
        return False


class LimitedHTTPProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits above, and with OpenAI's shape for what never reaches the application."""

    def __init__(self, *arguments: Any, limit: Connections, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._limit = limit
        self._timer: asyncio.TimerHandle | None = None
        self._unparsed = 0  # bytes since something came of them
        self._in_head = self._in_body = False
        self._ignores_input = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock for the first head; beyond the limit another one goes, or the application is another one."""
        super().connection_made(transport)
        self.transport = CoalescingTransport(transport, self.loop)  # type: ignore[assignment]
        surplus = len(self.connections) - self._limit.most
        if surplus > 0 and not self._limit.make_room():
            if surplus > self._limit.refusals:
                transport.abort()
            self.app = _only_probes(self.app, self._tell)
        self._limit.note(self, is_idle=True)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop_timer()
        self._limit.note(self, is_idle=False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Runs the clock while a head is on its way, and bounds what the parser keeps until it is whole."""
        if self._ignores_input or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._unparsed += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:  # no line in the log: anybody can send rubbish, as much as they like
            self._refuse(InvalidRequestError("Invalid HTTP request received."))
        if self._unparsed > MAX_HEAD_BYTES and not self._ignores_input:
            self._refuse(HeadTooLargeError())
        if self._timer is None and not self._is_at_work():
            self._await_head()
        self._limit.note(self, is_idle=self._is_idle())

    def _feed(self, data: bytes) -> None:
        """Parses `data`, for which a request to upgrade is one like any other.

        httptools stops after the head of one, and would take its body for the next request. So the request is parsed
        again without its wish, as RFC 9110, section 7.8 allows.
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
        """The first byte of a head is there."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers come by here, too, and are nobody's headers."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request begins. What is raised here is a 400."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")
        if self.parser.should_upgrade():
            return  # it comes again, without
        version, names = self.parser.get_http_version(), [name for name, _ in self.headers]
        if (version, names.count(b"host")) not in _WELL_FORMED:
            raise ValueError("another version, or not one Host")
        if version == "1.0":
            if b"transfer-encoding" in names:
                raise ValueError("HTTP/1.0 has no chunks")
            self.expect_100_continue = False
        super().on_headers_complete()
        self._stop_timer()
        self._unparsed, self._in_head, self._in_body = 0, False, True

    def on_body(self, body: bytes) -> None:
        """A part of it is there."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is there."""
        if self.parser.should_upgrade():
            return
        self._unparsed, self._in_body = 0, False
        if not self.parser.should_keep_alive():  # a trailer may say so: nothing more is parsed
            self.cycle.keep_alive = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Whoever was refused while sending may send on for a moment only."""
        if self._in_body and not self.pipeline:
            self._restart_timer(REST_SECONDS, self.transport.abort)
        elif self._in_head and not self.pipeline and not self.transport.is_closing():
            self._await_head()
        super().on_response_complete()
        self._limit.note(self, is_idle=self._is_idle())

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.waiting_for_100_continue or cycle.scope["http_version"] == "1.0":
            app = functools.partial(_framed, app, cycle)
        super()._start_asgi_task(cycle, app)

    def _is_at_work(self) -> bool:
        return self._in_body or not (self.cycle is None or self.cycle.response_complete)

    def _is_idle(self) -> bool:
        return not (self._in_head or self._is_at_work() or self.transport.is_closing())

    def _refuse(self, error: HyperGenError) -> None:
        """Ends the connection after the answers to what came before, and with this one where it is not too late."""
        self._tell(error.status)
        self._ignores_input = True
        if self.pipeline or (self._is_at_work() and not self._in_body):
            if self._in_body:  # the last in the queue is what is wrong
                answer: Any = error_response(error)
                self.pipeline[0] = (self.cycle, answer)
            self.cycle.keep_alive = False
            return
        if not (self._in_body and self.cycle.response_started):
            response = error_response(error)
            lines = [STATUS_LINE[error.status], b"connection: close\r\n"]
            lines += [b"%s: %s\r\n" % header for header in response.raw_headers if header[0] != b"connection"]
            self.transport.write(b"".join([*lines, b"\r\n", bytes(response.body)]))
        if self._in_body:  # the application waits for more of it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _tell(self, status: int) -> None:
        tell: Callable[[int], None] | None = self.app_state.get(ON_REJECTED)
        if tell is not None:
            tell(status)

    def _await_head(self) -> None:
        self._restart_timer(HEAD_SECONDS, self._give_up_head)

    def _give_up_head(self) -> None:
        """Whoever has begun is told so; who has said nothing expects nothing."""
        if self._in_head:
            self._refuse(RequestTimeoutError("The head of the request did not arrive in time."))
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
    """A transport that sends what is written in one turn of the loop at once: head and body of an answer are a packet.

    Sent one by one, each costs a system call, and wakes the client up.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Sends `data` at the end of this turn; much at once, so that the flow is controlled."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        if len(data) > MAX_HEAD_BYTES:
            self._flush()

    def close(self) -> None:
        """Ends the connection when everything is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def allow_open_files() -> None:
    """Lets this process have as many files open as it may, up to what all those connections and their forms need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft not in (resource.RLIM_INFINITY, allowed) and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class Listener(socket.socket):
    """A listening socket that stops accepting for a moment when no file can be opened.

    asyncio by itself stops then, too, but only after it has tried as often as its backlog is long, each time with a
    traceback.
    """

    _resumes = 0.0

    def listen(self, backlog: int = 0, /) -> None:
        """Lets the system hold more connections than asyncio accepts in a turn, which is what it gives as `backlog`."""
        super().listen(max(backlog, _WAITING_TO_BE_ACCEPTED))

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises `BlockingIOError` where there is none for now."""
        if time.monotonic() < self._resumes:
            raise BlockingIOError
        try:
            return super().accept()
        except OSError as error:
            if error.errno in _NO_FILE:
                self._resumes = time.monotonic() + 0.5  # less than asyncio waits until it tries again
            raise


class AcceptErrors:
    """An event loop's handler of exceptions: one line a minute, where asyncio tells each second of no open file."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs an exception that nobody else has seen."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _NO_FILE and "accept" in context["message"]):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + 60
            logger.warning("No connection can be accepted: %s", error.strerror)


def bounded(
    app: Any, *, keep_alive: float = KEEP_ALIVE_SECONDS, connections: Connections | None = None, **settings: Any
) -> uvicorn.Config:
    """uvicorn's configuration for an application behind such connections. It says nothing by itself.

    There are as many connections as this process may have open files for, unless a limit is given.
    """
    limit = connections or Connections.for_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    protocol: Any = functools.partial(LimitedHTTPProtocol, limit=limit)
    return uvicorn.Config(
        TrustedProxies(app),
        proxy_headers=False,
        http=protocol,
        ws="none",
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # seconds of asyncio's clock
        backlog=_ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        server_header=False,
        **settings,
    )


async def _framed(app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs `app` with an answer that ends as its client understands.

    Chunks are not of HTTP/1.0: there, what has no known length ends with the connection. So does what is said instead
    of "100 Continue", for whether the body then comes is up to the client.
    """
    is_unbounded = False

    def send_framed(message: Message) -> Awaitable[None]:
        nonlocal is_unbounded
        if message["type"] == "http.response.start":
            cycle.keep_alive &= not cycle.waiting_for_100_continue
            lengths = [value for name, value in message["headers"] if name == b"content-length"]
            is_unbounded = scope["http_version"] == "1.0" and not lengths
            if is_unbounded:
                cycle.chunked_encoding = False
        elif is_unbounded:
            cycle.expected_content_length = len(message.get("body", b""))
        return send(message)

    await app(scope, receive, send_framed)


def _only_probes(app: ASGIApp, tell: Callable[[int], None]) -> ASGIApp:
    """Answers orchestrators, who would end a server that did not, and nobody else."""

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        if canonical_path(scope.get("path", "")) in PROBE_PATHS:
            await app(scope, receive, send)
            return
        refusal = error_response(UnavailableError("The server has too many connections."))
        refusal.headers["Connection"] = "close"
        tell(refusal.status_code)
        await refusal(scope, receive, send)

    return busy
