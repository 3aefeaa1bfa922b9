"""A TCP proxy that drops connections, as networks do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class CuttingProxy:
    """Passes bytes on until it is told to cut."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._open: set[asyncio.StreamWriter] = set()
        self.handling: set[asyncio.Task[None]] = set()
        self.url = ""
        self.connections = 0
        self.swallowed = 0
        self.swallows_answers = False  # cuts a connection instead of passing an answer on

    def cut(self) -> None:
        """Resets every open connection, on both sides."""
        for writer in self._open:
            writer.transport.abort()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.handling.add(task)
        task.add_done_callback(self.handling.discard)
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        pair = {writer, upstream_writer}
        self._open |= pair
        try:
            await asyncio.gather(self._pipe(reader, upstream_writer), self._answer(upstream_reader, writer))
        finally:
            self._open -= pair
            for each in pair:
                each.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.swallows_answers:
            await reader.readuntil(b"\r\n\r\n")
            self.swallowed += 1
            writer.transport.abort()
            return
        await self._pipe(reader, writer)

    @staticmethod
    async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def cutting_proxy(url: str) -> AsyncIterator[CuttingProxy]:
    """A proxy in front of the server at `url`; its own is `proxy.url`."""
    parts = urlsplit(url)
    proxy = CuttingProxy(parts.hostname or "", parts.port or 0)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        await asyncio.gather(*proxy.handling, return_exceptions=True)
