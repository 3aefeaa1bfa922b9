"""Requests that are nearly right, by the hundred: none of them is a 500, hangs, or leaves a traceback.

The same ones every time; FUZZ_SEED chooses others.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from urllib.parse import urlsplit

import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, on_loopback
from support.image_files import file_of, photo
from support.wire import data_url, form, part

SECONDS = 6.0
SEED = int(os.environ.get("FUZZ_SEED", "2026"))
IMAGE = file_of(photo(16, 16))
TOKENS = [
    *(b"\r\n", b"\n", b"\x00", b"\xff", b"%00", b"%2e%2e/", b"../", b"\\", b'"', b"'", b"{", b"[", b"]" * 50, b":"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 7\r\n", b"Expect: 100-continue\r\n", b"Upgrade: x\r\n"),
    *(b"Content-Type: multipart/form-data; boundary=", b"Origin: null\r\n", b"Host: \r\n", b"Range: bytes=0-\r\n"),
    *(b"-1", b"1e999", b"9" * 30, b"null", b"NaN", b"true", b'"\\ud800"', b"--a-boundary--", b"\xf0\x9f\xa6\x8a"),
]


def request(method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def sound_requests() -> list[bytes]:
    sent = form(part("prompt", b"a fox"), part("n", b"2"), part("image[]", IMAGE, filename="x.png"))
    image = {"image_url": data_url(IMAGE)}
    edit = (sent["content"], sent["headers"]["Content-Type"])
    return [
        *(request("GET", path) for path in ("/", "/docs", "/web/app.js", "/health", "/metrics", "/v1/models")),
        request("GET", "/v1/models/acme%2Ftiny-emoji?x=y"),
        request("GET", "/files/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.png?expires=9999999999&signature=x"),
        request("POST", "/v1/images/generations", b'{"prompt": "a fox", "size": "64x64", "seed": 7, "n": 2}'),
        request("POST", "/v1/images/generations", b'{"prompt": "a fox", "stream": true, "partial_images": 2}'),
        request("POST", "/v1/images/edits", *edit),
        request("POST", "/v1/images/variations", *edit),
        request("POST", "/v1/images/edits", json.dumps({"prompt": "a", "images": [image]}).encode()),
    ]


def spoiled(sound: bytes, chance: random.Random) -> bytes:
    """The same with a few things cut out, doubled, changed or put in; mostly in the head, which is short."""
    data = bytearray(sound)
    for _ in range(chance.randint(1, 4)):
        end = len(data) if chance.random() < 0.5 else min(len(data), 200)
        start = chance.randrange(end) if end else 0
        stop = min(len(data), start + chance.choice([0, 0, 1, 4, 30]))
        match chance.randrange(4):
            case 0:
                del data[start:stop]
            case 1:
                data[start:start] = data[start:stop] * chance.choice([1, 2, 500])
            case 2:
                data[start:stop] = chance.randbytes(stop - start)
            case _:
                data[start:stop] = chance.choice(TOKENS)
    return bytes(data)


async def exchange(url: str, data: bytes, chance: random.Random) -> bytes:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        cut = chance.randrange(len(data) + 1)
        for piece in (data[:cut], data[cut:]):
            writer.write(piece)
            await asyncio.sleep(0)
        answer = asyncio.ensure_future(reader.read())
        await asyncio.wait([answer], timeout=0.05)
        if not answer.done():  # whatever it still waits for will not come
            writer.write_eof()
        return await asyncio.wait_for(answer, 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_nothing_that_is_nearly_a_request_breaks_the_server(caplog: pytest.LogCaptureFixture) -> None:
    chance, sound = random.Random(SEED), sound_requests()
    answered = count = 0
    ends = time.monotonic() + SECONDS
    async with on_loopback(create_app(Config(), FakeBackend())) as url:
        for data in sound:
            assert b" 50" not in (await exchange(url, data, chance))[:20]
        while time.monotonic() < ends:
            batch = [spoiled(chance.choice(sound), chance) for _ in range(16)]
            answers = await asyncio.gather(*(exchange(url, data, chance) for data in batch))
            for data, answer in zip(batch, answers, strict=True):
                assert not answer.startswith(b"HTTP/1.1 5"), (data[:1000], answer[:1000])
                assert b"Traceback" not in answer
                answered += bool(answer)
            count += len(batch)
        assert b" 200 " in (await exchange(url, sound[3], chance))[:20]
    print(f"{count} requests, {answered} answered")
    assert answered > count / 2 > 50
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
