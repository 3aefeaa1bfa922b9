"""Time limits for clients that send a body or read a response slowly.

Slow connections cost the server memory and a file descriptor each. The limit for a body grows with the bytes received,
so it is a minimum rate.
"""

from __future__ import annotations

import asyncio
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypergen_gateway.concurrency import run_with_timeout
from hypergen_gateway.errors import RequestTimeoutError

# Minimum rate of a body, a quarter of a megabit per second.
BYTES_PER_SECOND = 32 << 10
# Connections are closed if the client acknowledges no data for this long.
UNACKNOWLEDGED_SECONDS = 60


class BodyTimeout:
    """Rejects a body that is not received within `seconds`, plus one per `BYTES_PER_SECOND` bytes."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        deadline = now() + self._seconds
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal deadline, is_complete
            if is_complete:  # from now on this waits for a disconnect
                return await receive()
            try:
                message = await run_with_timeout(receive(), deadline - now())
            except TimeoutError:
                raise RequestTimeoutError(f"The body was not received within {self._seconds:g} seconds.") from None
            deadline += len(message.get("body", b"")) / BYTES_PER_SECOND
            is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


def set_tcp_user_timeout(listener: socket.socket, seconds: int = UNACKNOWLEDGED_SECONDS) -> None:
    """Have the kernel close connections of this listener whose sent data is not acknowledged for `seconds`."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
