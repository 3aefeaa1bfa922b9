"""What all kinds of clients do to a server, well-behaved and not, in random order.

Each thing that is done knows how it may end. Whatever ends otherwise is lost.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from support.running_server import KEY, Server

GENERATIONS = "/v1/images/generations"
SIZES = ("64x64", "96x64", "64x96", "80x64", "96x96")
FORMATS = ("png", "jpeg", "webp")
SCHEDULERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "heun")
SHORT, LONG = "a rocket on a yellow background", "two cats in the rain, " * 20
PROMPTS = (SHORT, "a cat", LONG, "😀")
LIMIT_SECONDS = 120.0
BURST = 12


@dataclass
class Outcomes:
    """What was done how often, and what ended otherwise than it may."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Everything that was done."""
        return sum(self.counts.values())


class UnexpectedError(Exception):
    """A request ended as it must not."""


async def drive(server: Server, seconds: float, in_flight: int, chance: random.Random, outcomes: Outcomes) -> None:
    """Do random things, `in_flight` at a time, for so many seconds; what was begun is ended."""
    ends = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=LIMIT_SECONDS) as client:

        async def one_after_another() -> None:
            while time.monotonic() < ends:
                doing = chance.choice(DOINGS)
                outcomes.counts[doing.__name__.replace("_", " ")] += 1
                try:
                    await doing(client, chance)
                except (UnexpectedError, httpx.HTTPError) as error:
                    outcomes.lost.append(f"{doing.__name__}: {error!r}")

        await asyncio.gather(*(one_after_another() for _ in range(in_flight)))


async def touch_every_shape(server: Server) -> None:
    """Generate every size with every number of rows, as an engine keeps something for each shape that it has seen.

    With short prompts and long ones, which have more chunks of tokens.
    """
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=LIMIT_SECONDS) as client:

        async def generate(prompt: str, size: str, images: int, guidance: int, steps: int = 1) -> None:
            body = {"prompt": prompt, "size": size, "n": images, "guidance_scale": guidance}
            await _generate(client, {**body, "num_inference_steps": steps}, 200)

        for prompt, size in itertools.product((SHORT, LONG), SIZES):
            for images in range(1, 9):
                await generate(prompt, size, images, 1)
                await generate(prompt, size, images, 2)
            for images in range(4, 8):  # odd numbers of rows, where they are generated together
                await asyncio.gather(generate(prompt, size, images, 2, 4), generate(prompt, size, 1, 1, 4))


def _body(chance: random.Random, **more: Any) -> dict[str, Any]:
    return {
        "prompt": chance.choice(PROMPTS),
        "size": chance.choice(SIZES),
        "n": chance.choice((1, 1, 2, 3)),
        "num_inference_steps": chance.randint(1, 12),
        "guidance_scale": chance.choice((1, 2, 7.5)),
        "scheduler": chance.choice(SCHEDULERS),
        "output_format": chance.choice(FORMATS),
        "negative_prompt": chance.choice((None, "blurry")),
        **more,
    }


def _check(answer: httpx.Response, *statuses: int) -> httpx.Response:
    if answer.status_code not in statuses:
        raise UnexpectedError(f"{answer.status_code} instead of {statuses}: {answer.text[:200]}")
    if answer.status_code == 429 and "retry-after" not in answer.headers:
        raise UnexpectedError("a 429 without Retry-After")
    return answer


async def _generate(client: httpx.AsyncClient, body: dict[str, Any], *statuses: int, **headers: str) -> httpx.Response:
    expected = statuses or (200, 429)
    return _check(await client.post(GENERATIONS, json=body, headers=headers), *expected)


async def generations(client: httpx.AsyncClient, chance: random.Random) -> None:
    body = _body(chance)
    answer = await _generate(client, body)
    if answer.status_code == 200 and len(answer.json()["data"]) != body["n"]:
        raise UnexpectedError("an image is missing")


async def links(client: httpx.AsyncClient, chance: random.Random) -> None:
    answer = await _generate(client, _body(chance, response_format="url"))
    for one in answer.json().get("data", []):
        _check(await client.get(one["url"]), 200)


async def streams(client: httpx.AsyncClient, chance: random.Random) -> None:
    body = _body(chance, stream=True, partial_images=chance.randint(0, 3))
    async with client.stream("POST", GENERATIONS, json=body) as answer:
        text = (await answer.aread()).decode()
    _check(answer, 200, 429)
    if answer.status_code == 200 and text.count("event: image_generation.completed") != body["n"]:
        raise UnexpectedError(f"a stream without its end: {text[-200:]}")


async def streams_left_early(client: httpx.AsyncClient, chance: random.Random) -> None:
    body = _body(chance, stream=True, partial_images=3, num_inference_steps=40)
    async with client.stream("POST", GENERATIONS, json=body) as answer:
        async for _ in answer.aiter_bytes():
            return


async def requests_left_early(client: httpx.AsyncClient, chance: random.Random) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        await client.post(GENERATIONS, json=_body(chance, num_inference_steps=40), timeout=chance.uniform(0.01, 0.5))


async def edits(client: httpx.AsyncClient, chance: random.Random) -> None:
    files = {"image": _image(chance, "RGB")}
    if chance.random() < 0.5:
        files["mask"] = _image(chance, "RGBA")
    data = {"prompt": "a cat", "num_inference_steps": "4", "n": str(chance.randint(1, 2))}
    _check(await client.post("/v1/images/edits", files=files, data=data), 200, 429)


async def edits_by_json(client: httpx.AsyncClient, chance: random.Random) -> None:
    url = f"data:image/png;base64,{base64.b64encode(_image(chance, 'RGB')).decode()}"
    body = {"prompt": "a cat", "images": [{"image_url": url}], "num_inference_steps": 3}
    _check(await client.post("/v1/images/edits", json=body), 200, 429)


async def variations(client: httpx.AsyncClient, chance: random.Random) -> None:
    data = {"num_inference_steps": "4"}
    _check(await client.post("/v1/images/variations", files={"image": _image(chance, "RGB")}, data=data), 200, 429)


async def the_same_twice(client: httpx.AsyncClient, chance: random.Random) -> None:
    body, key = _body(chance), uuid.UUID(int=chance.getrandbits(128)).hex
    headers = {"Idempotency-Key": key}
    both = await asyncio.gather(*(_generate(client, body, **headers) for _ in range(2)))
    if len({answer.status_code for answer in both}) != 1:
        raise UnexpectedError("one key, two answers")


async def bursts(client: httpx.AsyncClient, chance: random.Random) -> None:
    await asyncio.gather(*(_generate(client, _body(chance)) for _ in range(BURST)))


async def bad_fields(client: httpx.AsyncClient, chance: random.Random) -> None:
    bad: dict[str, Any] = chance.choice(
        [{"n": 99}, {"size": "0x7"}, {"scheduler": "none"}, {"prompt": ""}, {"num_inference_steps": 0}]
    )
    await _generate(client, _body(chance, **bad), 400)


async def bad_bodies(client: httpx.AsyncClient, chance: random.Random) -> None:
    content = chance.choice([b"{", b"", b"[" * 5000, b"\xff", bytes(2 << 20)])
    answer = await client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    _check(answer, 400, 413)


async def bad_files(client: httpx.AsyncClient, chance: random.Random) -> None:
    files = {"image": chance.randbytes(chance.choice((0, 10, 3 << 20)))}
    _check(await client.post("/v1/images/edits", files=files, data={"prompt": "a cat"}), 400)


async def wrong_keys(client: httpx.AsyncClient, chance: random.Random) -> None:
    await _generate(client, _body(chance), 401, Authorization="Bearer wrong")


async def deadlines_too_short(client: httpx.AsyncClient, chance: random.Random) -> None:
    answer = await client.post(GENERATIONS, json=_body(chance, deadline_ms=1))
    if answer.status_code not in (429, 504):  # whether any time would do is in the headers
        raise UnexpectedError(f"{answer.status_code}: {answer.text[:200]}")


async def questions(client: httpx.AsyncClient, chance: random.Random) -> None:
    for path in ("/v1/models", "/health", "/health/ready", "/metrics", "/v1/capabilities", "/", "/docs"):
        _check(await client.get(path), 200)
    _check(await client.get(f"/v1/{chance.getrandbits(32)}"), 404)


DOINGS: tuple[Callable[[httpx.AsyncClient, random.Random], Awaitable[None]], ...] = (
    *(generations, generations, links, streams, streams, streams_left_early, requests_left_early),
    *(edits, edits_by_json, variations, the_same_twice, bursts),
    *(bad_fields, bad_bodies, bad_files, wrong_keys, deadlines_too_short, questions),
)


def _image(chance: random.Random, mode: str) -> bytes:
    pixels = np.frombuffer(chance.randbytes(64 * 64 * len(mode)), np.uint8).reshape(64, 64, len(mode))
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    return file.getvalue()
