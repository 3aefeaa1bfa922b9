"""An ASGI client that lets a test control when the body ends and when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette


class LeavingClient:
    """A POST of JSON that reads what comes until it is told to leave. `sent` holds the messages that it was sent."""

    def __init__(self, app: Starlette, path: str, body: object, *, whole: bool = True) -> None:
        self._messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": not whole}]
        self._left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    @property
    def statuses(self) -> list[int]:
        """The statuses of all answers that began."""
        return [message["status"] for message in self.sent if message["type"] == "http.response.start"]

    @property
    def content(self) -> bytes:
        """What came of the bodies."""
        return b"".join(message.get("body", b"") for message in self.sent)

    async def leave(self) -> None:
        """Hangs up, and sees to it that the application ends."""
        self._left.set()
        await asyncio.wait_for(self.task, 5)

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
