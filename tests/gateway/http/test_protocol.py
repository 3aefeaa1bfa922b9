"""What a hostile or broken client can do to a socket: spoken byte by byte to the gateway under uvicorn."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.http import protocol as connections
from hypergen_gateway.http.protocol import AcceptErrors, Connections, make_uvicorn_config
from support.fake_backend import FakeBackend, on_loopback, until

BODY = b'{"prompt": "a fox"}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PART = 'Content-Disposition: form-data; name="prompt"\r\n\r\n'
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LAST = b"Connection: close\r\n\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


pytestmark = pytest.mark.asyncio(loop_scope="module")


class Wire:
    """The gateway, and connections to it."""

    def __init__(self, url: str) -> None:
        self.place = urlsplit(url)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.place.hostname, self.place.port)

    async def say(self, *parts: bytes, pause: float = 0.0, limit: float = 5.0) -> bytes:
        """All that is answered until the server ends the connection; what comes later fails the test."""
        reader, writer = await self.connect()
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            return await asyncio.wait_for(reader.read(), limit)
        finally:
            writer.close()

    async def rejections(self, status: int) -> float:
        """How many requests the gateway has rejected with this status before routing."""
        answer = await self.say(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + LAST)
        lines = [line.split() for line in answer.decode().splitlines()]
        name = f'hypergen_gateway_protocol_rejections_total{{status="{status}"}}'
        (value,) = [words[1] for words in lines if words[:1] == [name]]
        return float(value)


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def wire(backend: FakeBackend) -> AsyncIterator[Wire]:
    async with on_loopback(create_app(Config(), backend)) as url:
        yield Wire(url)


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def error_in(answer: bytes) -> dict[str, Any]:
    """OpenAI's error in an answer that is one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
FORM = "multipart/form-data; boundary=b"


class TestHeads:
    @pytest.mark.parametrize(
        ("head", "answers"),
        [
            (b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: x\r\n" + LAST, [414]),
            (b"GET /health?" + b"a" * 8192 + b" HTTP/1.1\r\nHost: x\r\n" + LAST, [414]),
            (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n" + LAST, [400]),
            (b"GET /" + b"a" * 100_000, [431]),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100 + LAST, [431]),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 33_000 + b"\r\n" + LAST, [431]),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10_000_000, [431]),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 1_000_000, [431]),
        ],
    )
    async def test_one_that_no_client_needs_is_refused(self, wire: Wire, head: bytes, answers: list[int]) -> None:
        answer = await wire.say(head)
        (status,) = statuses(answer)
        assert status in answers
        assert error_in(answer)["code"] == {400: None, 414: "uri_too_long", 431: "headers_too_large"}[status]

    @pytest.mark.parametrize("head", [POST + b"Content-Length: 999999999\r\n" + LAST, POST + b"X: " + b"y" * 70_000])
    async def test_a_client_that_sends_more_than_is_read_receives_its_answer(self, wire: Wire, head: bytes) -> None:
        """As those of Python do, which read the answer after they have sent everything."""
        address = wire.place.hostname, wire.place.port

        def send_and_read() -> bytes:
            with socket.create_connection(address, timeout=5) as client:
                client.sendall(head)
                client.sendall(b"y" * (20 << 20))
                return b"".join(iter(lambda: client.recv(1 << 16), b""))

        (status,) = statuses(await asyncio.to_thread(send_and_read))
        assert status in (413, 431)

    @pytest.mark.parametrize("reads", [True, False])
    async def test_a_client_that_reads_slowly_receives_everything_and_one_that_stops_does_not(
        self, monkeypatch: pytest.MonkeyPatch, reads: bool
    ) -> None:
        monkeypatch.setattr(connections, "LINGER_SECONDS", 0.5)
        large = Response(bytes(20 << 20))  # more than the kernel buffers
        async with on_loopback(Starlette(routes=[Route("/{path:path}", lambda _: large)])) as url:
            reader, writer = await Wire(url).connect()
            writer.write(LIVE + b"\x00")
            received = 0
            for _ in range(40):
                await asyncio.sleep(0.05)
                received += len(await reader.readexactly(1 << 18)) if reads else 0
            received += len(await asyncio.wait_for(reader.read(), 10))
            writer.close()
        assert (received > len(large.body)) is reads

    async def test_what_clients_do_send_fits(self, wire: Wire) -> None:
        more = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 300) for number in range(90))
        head = b"GET /health?" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n" + more + LAST
        assert statuses(await wire.say(head)) == [200]

    @pytest.mark.parametrize(
        "rubbish",
        [
            b"\r\n\r\n\r\n\x00\x01\x02\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",  # no Host
            b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n: c\r\n\r\n",
            b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
            b"G\xc3\x84T / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
        ],
    )
    async def test_malformed_data_is_a_400_in_openai_s_shape_counted_and_not_logged(
        self, wire: Wire, caplog: pytest.LogCaptureFixture, rubbish: bytes
    ) -> None:
        before = await wire.rejections(400)
        answer = await wire.say(rubbish)
        assert statuses(answer) == [400]
        assert error_in(answer)["type"] == "invalid_request_error"
        assert await wire.rejections(400) == before + 1
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize(
        ("line", "status"),
        [
            (b"GET /health HTTP/1.0\r\n\r\n", 200),  # needs no Host
            (b"GET /%00 HTTP/1.1\r\nHost: x\r\n" + LAST, 404),
            (b"GET /web/%00 HTTP/1.1\r\nHost: x\r\n" + LAST, 404),
            (b"GET /files/%00.png?expires=\x00&signature=%00 HTTP/1.1\r\nHost: x\r\n" + LAST, 400),
            (b"GET /files/%00.png?expires=%00&signature=%00 HTTP/1.1\r\nHost: x\r\n" + LAST, 404),
            (b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: x\r\n" + LAST, 404),
            (b"GET http://127.0.0.1:1/health HTTP/1.1\r\nHost: x\r\n" + LAST, 200),  # ours: this is no proxy
            (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n" + LAST, 400),
            (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + LAST, 404),
            (b"GET /health HTTP/9.9\r\nHost: x\r\n" + LAST, 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),  # HTTP/2 without asking
            (b"BREW /health HTTP/1.1\r\nHost: x\r\n" + LAST, 400),
            (b"PURGE /health HTTP/1.1\r\nHost: x\r\n" + LAST, 405),
            (b'GET /docs HTTP/1.1\r\nHost: "><script>\r\n' + LAST, 200),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n", 200),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: upgrade, close\r\n\r\n", 200),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" + LAST, 200),
        ],
    )
    async def test_the_unusual_is_answered_as_what_it_is(
        self, wire: Wire, caplog: pytest.LogCaptureFixture, line: bytes, status: int
    ) -> None:
        answer = await wire.say(line)
        assert statuses(answer) == [status]
        assert b"<script>" not in answer
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


class TestFraming:
    @pytest.mark.parametrize(
        ("request_", "answers"),
        [
            (POST + LENGTH + LAST + BODY, [200]),
            (POST + CHUNKED + LAST + CHUNKS, [200]),
            # What one side reads as the end and the other does not is how a request is smuggled past a proxy.
            (POST + LENGTH + CHUNKED + LAST + CHUNKS, [400]),
            (POST + CHUNKED + LENGTH + LAST + CHUNKS, [400]),
            (POST + LENGTH + b"Content-Length: 5\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: 19, 5\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: +19\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: -1\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: 0x13\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: 1e1\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: " + b"9" * 20 + b"\r\n" + LAST + BODY, [400]),
            (POST + b"Content-Length: " + b"9" * 15 + b"\r\n" + LAST + BODY, [413]),
            (POST + LENGTH + LENGTH + LAST + BODY, [400]),
            (POST + b"Transfer-Encoding: identity\r\n" + LAST + BODY, [400]),
            (POST + b"Transfer-Encoding: gzip, chunked\r\n" + LAST + CHUNKS, [400]),
            (POST + b"Transfer-Encoding: xchunked\r\n" + LAST + CHUNKS, [400]),
            (POST + CHUNKED + CHUNKED + LAST + CHUNKS, [400]),
            (POST + b"Transfer-Encoding:\x0bchunked\r\n" + LAST + CHUNKS, [400]),
            (POST + b"Transfer-Encoding : chunked\r\n" + LAST + CHUNKS, [400]),
            (POST + CHUNKED + LAST + b"zz\r\n" + BODY, [400]),
            (POST + CHUNKED + LAST + b"-13\r\n" + BODY, [400]),
            (POST + CHUNKED + LAST + b"0x13\r\n" + BODY, [400]),
            (POST + CHUNKED + LAST + b"13\r\n" + BODY + b"XX0\r\n\r\n", [400]),
            (POST + CHUNKED + LAST + b"f" * 30 + b"\r\n" + BODY, [400]),
            # Pipelined: in order, and what follows a broken one is not read.
            (
                b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n" + LAST,
                [200, 200, 200, 404],
            ),
            (POST + LENGTH + CHUNKED + b"\r\n" + CHUNKS + b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + LAST, [400]),
        ],
    )
    async def test_a_body_has_one_end_or_none_is_read(
        self, wire: Wire, caplog: pytest.LogCaptureFixture, request_: bytes, answers: list[int]
    ) -> None:
        assert statuses(await wire.say(request_)) == answers
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]

    @pytest.mark.parametrize(
        "request_",
        [
            POST + b"Content-Length: 19 \r\n" + LAST + BODY,
            POST + b"Content-Length:\r\n" + LAST + BODY,
            POST + b"Content-Length: 1 9\r\n" + LAST + BODY,
            POST + b"Content-Length: 1_9\r\n" + LAST + BODY,
            POST + b"Content-Length:\r\n 19\r\n" + LAST + BODY,
            POST + b"Content-Length\x00: 19\r\n" + LAST + BODY,
            POST + b"Content-Length\t: 19\r\n" + LAST + BODY,
            POST + b"Transfer-Encoding: chunked,\r\n" + LAST + CHUNKS,
            POST + b"Transfer-Encoding: ,chunked\r\n" + LAST + CHUNKS,
            POST + b"Transfer-Encoding:\r\n" + LENGTH + LAST + BODY,
            POST + b"Transfer-Encoding:\r\n chunked\r\n" + LAST + CHUNKS,
            POST + b'Transfer-Encoding: "chunked"\r\n' + LAST + CHUNKS,
            POST.replace(b"1.1", b"1.0") + CHUNKED + LAST + CHUNKS,  # HTTP/1.0 has none: a proxy may not know it
            POST.replace(b"1.1", b"1.0") + CHUNKED + b"Connection: keep-alive\r\n\r\n" + CHUNKS + LIVE,
            POST + CHUNKED + LAST + b"13\n" + BODY + b"\r\n0\r\n\r\n",
            POST + CHUNKED + LAST + b"13;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n",
            POST + CHUNKED + LAST + b"13;a\rb\r\n" + BODY + b"\r\n0\r\n\r\n",
            POST + CHUNKED + LAST + b"13\r\n" + BODY + b"\n0\r\n\r\n",
            POST + CHUNKED + LAST + b"13\r\n" + BODY + b"\r\n0\n\n",
            POST + CHUNKED + LAST + b"13\r\n" + BODY + b"\r\n0\r\nContent-Length: 5\r\n\r\n" + LIVE,
            POST + CHUNKED + LAST + b"13\r\n" + BODY + b"\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n" + LIVE,
            b"GET /health/live HTTP/1.1\nHost: x\nConnection: close\n\n",
            b"GET /health/live HTTP/1.1\r\nHost: x\rX: y\r\n" + LAST,
            b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n" + LENGTH + LAST + BODY,
        ],
    )
    async def test_what_another_server_may_read_otherwise_is_refused(
        self, wire: Wire, backend: FakeBackend, request_: bytes
    ) -> None:
        before = len(backend.generations)
        assert statuses(await wire.say(request_)) == [400]
        assert len(backend.generations) == before

    @pytest.mark.parametrize("said", [b"Connection: close\r\n", b"Upgrade: h2c\r\nConnection: upgrade, close\r\n"])
    async def test_a_trailer_that_ends_the_connection_leaves_no_request_without_an_answer(
        self, wire: Wire, said: bytes
    ) -> None:
        head = POST + CHUNKED + b"\r\n" + CHUNKS.removesuffix(b"\r\n")
        answer = await wire.say(head + said + b"\r\n" + LIVE)
        assert statuses(answer) == [200]
        assert b"connection: close" in answer

    async def test_the_body_of_an_expectation_that_was_not_met_is_not_waited_for(self, wire: Wire) -> None:
        """Its client may well not send it: what comes next would be taken for it."""
        head = POST + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
        answer = await wire.say(head, LIVE, pause=0.1)
        assert statuses(answer) == [413]
        assert b"connection: close" in answer

    async def test_an_expectation_is_met_when_the_body_is_read_and_not_in_http_1_0(self, wire: Wire) -> None:
        for version, answers in ((b"1.1", [100, 200]), (b"1.0", [200])):
            head = POST.replace(b"1.1", version) + LENGTH + b"Expect: 100-continue\r\n" + LAST
            assert statuses(await wire.say(head, BODY, pause=0.1)) == answers

    @pytest.mark.parametrize(
        "rubbish", [b'"}', b'"}\r\n\r\n', b"\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100_000]
    )
    async def test_malformed_data_after_a_request_does_not_cost_it_its_response(
        self, wire: Wire, rubbish: bytes
    ) -> None:
        before = await wire.rejections(400)
        answer = await wire.say(LIVE + POST + LENGTH + b"\r\n" + BODY + rubbish + LIVE)
        assert statuses(answer) == [200, 200]
        assert answer.count(b"connection: close") == 1
        assert await wire.rejections(400) == before + 1

    async def test_a_broken_body_behind_a_request_does_not_take_its_answer(self, wire: Wire) -> None:
        answer = await wire.say(LIVE + POST + CHUNKED + b"\r\nzz\r\n" + LIVE)
        assert statuses(answer) == [200, 400]
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"] == "Invalid HTTP request received."

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize(
        ("path", "kind", "body", "words"),
        [
            (GENERATIONS, "application/json", '{"prompt": "é"}', "ends too early"),
            (GENERATIONS, "application/json", '{"prompt": "🦊🦊🦊"}', "ends too early"),
            (EDITS, "multipart/form-data; boundary=b", "--b\r\n" + PART + "é\r\n--b--", "before its last boundary"),
            (EDITS, "multipart/form-data; boundary=b", "--b\r\n" + PART + "é" * 90 + "\r\n--b--\r\n", "last boundary"),
        ],
    )
    async def test_a_length_in_characters_is_told_so_and_the_rest_is_no_request(
        self, wire: Wire, path: str, kind: str, body: str, words: str, apart: bool
    ) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        whole = body.encode()
        parts = [head.encode() + whole[: len(body)], whole[len(body) :]]
        answer = await wire.say(*parts, pause=0.1) if apart else await wire.say(b"".join(parts) + LIVE)
        assert statuses(answer) == [400]
        assert words in error_in(answer)["message"]

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize(("kind", "body"), [("application/json", BODY[:-2]), (FORM, b"--b\r\n" + PART.encode())])
    async def test_what_follows_a_body_that_was_cut_is_not_answered(
        self, wire: Wire, kind: str, body: bytes, apart: bool
    ) -> None:
        head = f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        parts = [head.encode() + body, SMUGGLED]
        assert statuses(await (wire.say(*parts, pause=0.1) if apart else wire.say(b"".join(parts)))) == [400]

    async def test_a_folded_header_is_none(self, wire: Wire) -> None:
        folded = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n b\r\n" + LAST
        assert statuses(await wire.say(folded)) == [400]

    @pytest.mark.parametrize(
        "endless", [b"13;" + b"x" * 30_000, b"0" * 30_000, b"0\r\nX: " + b"y" * 30_000, b"0\r\n" + b"X: y\r\n" * 5_000]
    )
    async def test_what_stands_between_chunks_ends_or_is_refused(self, wire: Wire, endless: bytes) -> None:
        more = endless[-30_000:]
        answer = await wire.say(POST + CHUNKED + LAST, endless, *[more] * 10, pause=0.02)
        assert statuses(answer) in ([431], [400])

    async def test_a_trailer_is_no_header(self, wire: Wire) -> None:
        chunks = CHUNKS.removesuffix(b"\r\n") + b"X-Request-Id: from-a-trailer\r\n\r\n"
        answer = await wire.say(POST + CHUNKED + LAST + chunks)
        assert statuses(answer) == [200]
        assert b"from-a-trailer" not in answer


UPGRADES = [
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n",
    b"Connection: Upgrade\r\nConnection: close\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
]


class TestUpgrade:
    """Another protocol is never spoken: RFC 9110 lets a server ignore the header and respond in this one."""

    @pytest.mark.parametrize("upgrade", UPGRADES)
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("apart", [False, True])
    async def test_its_body_is_read_as_that_of_any_other_request(
        self, wire: Wire, backend: FakeBackend, upgrade: bytes, chunked: bool, apart: bool
    ) -> None:
        before = len(backend.generations)
        head, body = POST + upgrade, CHUNKED + LAST + CHUNKS if chunked else LENGTH + LAST + BODY
        parts = [head + body] if not apart else [head + body[:-20], body[-20:-10], body[-10:]]
        assert statuses(await wire.say(*parts, pause=0.05 * apart)) == [200]
        assert [generation.prompt for generation in backend.generations[before:]] == ["a fox"]

    @pytest.mark.parametrize("upgrade", UPGRADES[:3])
    @pytest.mark.parametrize("apart", [False, True])
    async def test_a_body_that_looks_like_a_request_is_none(self, wire: Wire, upgrade: bytes, apart: bool) -> None:
        head = POST + upgrade + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
        parts = [head, SMUGGLED] if apart else [head + SMUGGLED]
        answer = await wire.say(*parts, LIVE.replace(b"\r\n\r\n", b"\r\n" + LAST), pause=0.1 * apart)
        assert statuses(answer) == [400, 200]  # of the body, which is no JSON, and of the request that follows it

    @pytest.mark.parametrize("upgrade", UPGRADES[:3])
    async def test_requests_that_follow_it_are_answered_in_order(self, wire: Wire, upgrade: bytes) -> None:
        get = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n"
        post = POST + upgrade + LENGTH + b"\r\n" + BODY
        last = POST + upgrade + LENGTH + LAST + BODY
        assert statuses(await wire.say(LIVE + post + get + post + LIVE + last)) == [200, 200, 404, 200, 200, 200]

    async def test_it_keeps_no_other_check_from_being_made(self, wire: Wire) -> None:
        upgrade = UPGRADES[0]
        assert statuses(await wire.say(POST + upgrade + LENGTH + CHUNKED + LAST + CHUNKS)) == [400]
        assert statuses(await wire.say(POST + upgrade + b"Content-Length: 999999999\r\n" + LAST)) == [413]
        assert statuses(await wire.say(POST.replace(b"Host: x\r\n", b"") + upgrade + LENGTH + LAST + BODY)) == [400]
        assert statuses(await wire.say(POST + upgrade + b"X: " + b"y" * 33_000 + b"\r\n" + LAST)) == [431]


class TestOldVersion:
    """HTTP/1.0, which nginx still speaks to a server behind it unless it is told otherwise."""

    GET = b"GET /health/live HTTP/1.0\r\n\r\n"

    async def test_a_stream_is_not_chunked_and_ends_with_the_connection(self, wire: Wire) -> None:
        body = b'{"prompt": "a fox", "stream": true, "partial_images": 1}'
        head = POST.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
        head, _, events = (await wire.say(head + body)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"content-length" not in head.lower()
        assert b"connection: close" in head.lower()
        lines = events.splitlines()
        assert [line for line in lines if line.startswith(b"event: ")] == [
            b"event: image_generation.partial_image", b"event: image_generation.completed",
        ]  # fmt: skip
        assert all(json.loads(line[6:]) for line in lines if line.startswith(b"data: "))
        assert {line.partition(b":")[0] for line in lines} == {b"event", b"data", b""}

    async def test_an_answer_of_known_length_says_it(self, wire: Wire) -> None:
        head, _, body = (await wire.say(self.GET)).partition(b"\r\n\r\n")
        assert body == b'{"status":"live"}'
        assert b"content-length: 17" in head.lower()
        assert statuses(await wire.say(self.GET.replace(b"GET", b"HEAD"))) == [200]


class TestTime:
    @pytest.fixture(autouse=True)
    def _hurried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
        monkeypatch.setattr(connections, "REST_SECONDS", 0.3)
        monkeypatch.setattr(connections, "LINGER_SECONDS", 0.3)

    async def test_a_connection_that_says_nothing_is_ended(self, wire: Wire) -> None:
        began = time.monotonic()
        assert await wire.say(b"") == b""
        assert 0.25 < time.monotonic() - began < 2

    @pytest.mark.parametrize("begun", [b"G", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
    @pytest.mark.parametrize("first", [b"", LIVE])
    async def test_a_head_that_stops_half_way_is_a_408(self, wire: Wire, first: bytes, begun: bytes) -> None:
        before = await wire.rejections(408)
        began = time.monotonic()
        answer = await wire.say(first, begun, pause=0.1)
        assert statuses(answer) == [200] * bool(first) + [408]
        refusal = answer[answer.rindex(b"HTTP/1.1") :]
        assert error_in(refusal)["code"] == "request_timeout"
        assert 0.25 < time.monotonic() - began < 2
        assert await wire.rejections(408) == before + 1

    async def test_what_was_rejected_is_rejected_once(
        self, wire: Wire, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connections, "LINGER_SECONDS", 1.0)
        before = await wire.rejections(400), await wire.rejections(408)
        reader, writer = await wire.connect()
        writer.write(b"GET / HTTP/1.1\r\nbad header\r\n\r\n")
        assert statuses(await reader.read()) == [400]
        await asyncio.sleep(0.6)  # longer than a head may take; the connection lingers
        writer.close()
        assert (await wire.rejections(400), await wire.rejections(408)) == (before[0] + 1, before[1])
        assert not [record for record in caplog.records if record.exc_info]

    async def test_half_a_head_that_came_with_a_request_is_not_kept_either(self, wire: Wire) -> None:
        began = time.monotonic()
        assert statuses(await wire.say(LIVE + b"GET /health")) == [200, 408]
        assert time.monotonic() - began < 2

    async def test_a_head_that_comes_drop_by_drop_is_ended(self, wire: Wire) -> None:
        began = time.monotonic()
        reader, writer = await wire.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        answer = asyncio.ensure_future(reader.read())
        while not answer.done():
            writer.write(b"X: y\r\n")
            await asyncio.wait([answer], timeout=0.05)
        writer.close()
        assert statuses(answer.result()) == [408]
        assert time.monotonic() - began < 3

    async def test_a_request_may_take_longer_than_its_head(self, wire: Wire, backend: FakeBackend) -> None:
        backend.open.clear()
        asyncio.get_running_loop().call_later(0.6, backend.open.set)
        head, body = POST + LENGTH + LAST, BODY
        assert statuses(await wire.say(head, body[:5], body[5:], pause=0.2)) == [200]

    async def test_what_follows_a_refusal_is_read_for_a_moment_only(self, wire: Wire) -> None:
        reader, writer = await wire.connect()
        writer.write(POST + b"Content-Length: 999999999\r\n\r\n")
        assert b" 413 " in await reader.readline()
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            await self.send_on(writer)
        assert time.monotonic() - began < 2

    @staticmethod
    async def send_on(writer: asyncio.StreamWriter) -> None:
        for _ in range(500):
            writer.write(b" " * 1000)
            await writer.drain()
            await asyncio.sleep(0.01)


class TestNumber:
    """Three connections, and two more that are told that there are too many."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def few(self, backend: FakeBackend) -> AsyncIterator[Wire]:
        backend.open.clear()
        async with on_loopback(create_app(Config(), backend), connections=Connections(3, 2)) as url:
            yield Wire(url)
            backend.open.set()

    @staticmethod
    async def occupy(wire: Wire, stack: AsyncExitStack, backend: FakeBackend, count: int) -> list[asyncio.StreamReader]:
        """As many connections with a request that generates an image."""
        readers = []
        for number in range(count):
            reader, writer = await wire.connect()
            stack.callback(writer.close)
            writer.write(POST + LENGTH + b"\r\n" + BODY)
            await until(lambda number=number: backend.running == number + 1)  # type: ignore[misc]
            readers.append(reader)
        return readers

    async def test_beyond_the_limit_probes_are_answered_and_others_told_so(
        self, few: Wire, backend: FakeBackend
    ) -> None:
        async with AsyncExitStack() as stack:
            readers = await self.occupy(few, stack, backend, 3)
            refused = await few.say(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert statuses(refused) == [503]
            assert error_in(refused)["code"] == "service_unavailable"
            assert b"retry-after: " in refused.lower()
            for path in (b"/health/live", b"/health/", b"//health"):
                assert statuses(await few.say(b"GET %s HTTP/1.1\r\nHost: x\r\n" % path + LAST)) == [200]
            backend.open.set()
            assert [await reader.readline() for reader in readers] == [b"HTTP/1.1 200 OK\r\n"] * 3
        assert await few.rejections(503) == 1

    async def test_the_idlest_makes_room_for_a_new_one(self, few: Wire, backend: FakeBackend) -> None:
        """Those that are kept for a next request, and those that never had one; a request under way is left alone."""
        async with AsyncExitStack() as stack:
            (busy,) = await self.occupy(few, stack, backend, 1)
            idle = []
            for said in (b"", LIVE):
                reader, writer = await few.connect()
                stack.callback(writer.close)
                writer.write(said)
                if said:
                    await reader.readuntil(b'{"status":"live"}')
                idle.append(reader)
            for evicted in range(2):
                reader, writer = await few.connect()
                stack.callback(writer.close)
                writer.write(LIVE)
                assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 200 OK\r\n"
                assert await asyncio.wait_for(idle[evicted].read(), 5) == b""
            backend.open.set()
            assert await busy.readline() == b"HTTP/1.1 200 OK\r\n"

    async def test_many_idle_ones_keep_nobody_out(self, backend: FakeBackend) -> None:
        backend.open.set()
        async with (
            on_loopback(create_app(Config(), backend), connections=Connections(50, 5)) as url,
            AsyncExitStack() as stack,
        ):
            wire = Wire(url)
            for _ in range(300):
                _, writer = await wire.connect()
                stack.callback(writer.close)
                writer.write(LIVE)
            assert statuses(await wire.say(LIVE.replace(b"\r\n\r\n", b"\r\n" + LAST))) == [200]
            assert statuses(await wire.say(POST + LENGTH + LAST + BODY)) == [200]

    @pytest.mark.parametrize(
        ("files", "most"), [(64, 32), (1024, 512), (4096, 1000), (1 << 20, 1000), (resource.RLIM_INFINITY, 1000)]
    )
    async def test_there_are_no_more_than_files_may_be_open_for(self, files: int, most: int) -> None:
        connections = Connections.for_files(files)
        assert connections.most == most
        assert files < 0 or connections.most + connections.rejections < 0.7 * files


class TestKeepAlive:
    async def test_a_connection_is_kept_as_long_as_it_was_told(self, backend: FakeBackend) -> None:
        backend.open.set()
        for keep_alive in (0.2, 0.6):
            async with on_loopback(create_app(Config(), backend), keep_alive=keep_alive) as url:
                began = time.monotonic()
                assert statuses(await Wire(url).say(LIVE)) == [200]
                assert keep_alive - 0.05 < time.monotonic() - began < keep_alive + 2

    async def test_by_default_it_outlasts_the_pools_of_proxies(self, backend: FakeBackend) -> None:
        assert make_uvicorn_config(create_app(Config(), backend)).timeout_keep_alive == Config().keep_alive == 75


class TestOpenFiles:
    async def test_where_no_file_can_be_opened_accepting_pauses_in_one_line_of_the_log(
        self, backend: FakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend.open.set()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with on_loopback(create_app(Config(), backend)) as url:
            address = urlsplit(url)
            assert statuses(await Wire(url).say(LIVE.replace(b"\r\n\r\n", b"\r\n" + LAST))) == [200]
            # The kernel makes these connections; nobody has accepted them yet.
            clients = [socket.create_connection((str(address.hostname), address.port or 0)) for _ in range(20)]
            asyncio.get_running_loop().set_exception_handler(AcceptErrors())
            spare = [os.dup(0)]  # until none is free below the highest
            while spare[-1] < max(int(name) for name in os.listdir("/proc/self/fd")) - 1:  # noqa: PTH208
                spare.append(os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
            try:
                began = time.process_time()
                await asyncio.sleep(0.5)
                assert time.process_time() - began < 0.4
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for file in spare:
                    os.close(file)
            for client in clients:
                reader, writer = await asyncio.open_connection(sock=client)
                writer.write(LIVE)
                assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 200 OK\r\n"
                writer.close()
        # Whatever else opens a file meanwhile complains in a line of its own, such as the removal of expired images.
        lines = [record for record in caplog.records if "connection" in record.getMessage()]
        assert [line.getMessage() for line in lines] == ["No connection can be accepted: Too many open files"]
        assert not [line for line in lines if line.exc_info]
