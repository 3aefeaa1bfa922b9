"""Clients that send slowly and clients that do not read, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time

import pytest
from starlette.types import Message, Receive, Scope, Send

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import RequestTimeoutError
from hypergen_gateway.http.addresses import listening
from hypergen_gateway.http.body_timeout import BYTES_PER_SECOND, BodyTimeout, set_tcp_user_timeout
from support.fake_backend import FakeBackend, on_loopback

BODY = json.dumps({"prompt": "cat"}).encode()
HEAD = (
    f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}"
)


async def send_slowly(url: str, pause: float) -> tuple[int, bytes, float]:
    """One byte after each pause; the status, the body and the seconds until the server ended the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    began = time.monotonic()
    answer = asyncio.ensure_future(reader.read())
    writer.write(f"{HEAD}\r\n\r\n".encode())
    with contextlib.suppress(ConnectionError):
        for byte in BODY:
            await asyncio.wait([answer], timeout=pause)
            writer.write(bytes([byte]))
    head, _, body = (await asyncio.wait_for(answer, 10)).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body, time.monotonic() - began


async def test_a_body_of_a_byte_now_and_then_ends_in_a_408_and_the_connection_with_it() -> None:
    async with on_loopback(create_app(Config(body_timeout=0.3), FakeBackend())) as url:
        status, body, seconds = await send_slowly(url, pause=0.1)
    assert status == 408
    assert json.loads(body)["error"]["code"] == "request_timeout"
    assert 0.3 <= seconds < 2


class Trickle:
    """A client whose body comes in pieces of `size` bytes, one after each `pause`, and who stays for the answer."""

    def __init__(self, pieces: int, size: int, pause: float) -> None:
        self.left = pieces
        self.size = size
        self.pause = pause

    async def receive(self) -> Message:
        await asyncio.sleep(self.pause)
        if not self.left:
            return {"type": "http.disconnect"}
        self.left -= 1
        return {"type": "http.request", "body": b"x" * self.size, "more_body": bool(self.left)}


async def _send(message: Message) -> None:
    raise AssertionError(message)


async def _read_all(_: Scope, receive: Receive, __: Send) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def test_a_large_body_may_take_longer_than_a_small_one() -> None:
    app = BodyTimeout(_read_all, seconds=0.1)
    await app({"type": "http"}, Trickle(6, BYTES_PER_SECOND // 20, pause=0.05).receive, _send)
    with pytest.raises(RequestTimeoutError):
        await app({"type": "http"}, Trickle(6, 1, pause=0.05).receive, _send)


async def test_once_the_body_is_there_the_client_may_wait_for_its_answer() -> None:
    client = Trickle(1, 10, pause=0.05)
    waited = BodyTimeout(_read_all, seconds=0.08)
    began = time.monotonic()
    await waited({"type": "http"}, client.receive, _send)
    assert time.monotonic() - began > 0.08


async def test_a_client_that_reads_nothing_loses_its_connection() -> None:
    lost = asyncio.get_running_loop().create_future()

    class Sender(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.write(bytes(32 << 20))

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(exc)

    with listening("127.0.0.1", 0) as (listener,):
        set_tcp_user_timeout(listener, seconds=1)
        server = await asyncio.get_running_loop().create_server(Sender, sock=listener)
        _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
        assert isinstance(await asyncio.wait_for(lost, 10), TimeoutError | ConnectionError)
        writer.transport.abort()
        server.close()


def test_no_answer_waits_for_the_client_to_acknowledge_its_beginning() -> None:
    with listening("127.0.0.1", 0) as (listener,), socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
