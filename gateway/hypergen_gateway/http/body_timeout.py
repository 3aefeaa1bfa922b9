"""How long a client may take to send a body, and to read its answer.

A connection costs a client nothing and the server memory and a file handle, so no client keeps one for nothing. A
body's limit grows with what has come: it is a pace rather than a time.
"""

from __future__ import annotations

import asyncio
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen_gateway.errors import RequestTimeoutError

# A body may take a second more for each: a quarter of a megabit per second.
BYTES_PER_SECOND = 32 << 10
# Whoever takes nothing of an answer for so long has gone, as has whoever cannot be reached.
UNREAD_SECONDS = 60


class BodyTimeout:
    """Refuses a body that is not there within `seconds`, and one more for each `BYTES_PER_SECOND`."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        ends = now() + self._seconds
        whole = False

        async def receive_in_time() -> Message:
            nonlocal ends, whole
            if whole:  # what is waited for now is the client's departure
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), ends - now())
            except asyncio.TimeoutError:
                raise RequestTimeoutError(f"The body did not arrive within {self._seconds:g} seconds.") from None
            ends += len(message.get("body", b"")) / BYTES_PER_SECOND
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


def set_tcp_user_timeout(listener: socket.socket, seconds: int = UNREAD_SECONDS) -> None:
    """Let the system end connections of this listener when what was sent is not taken for so long."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
