"""Parsing of responses: errors, images and events in OpenAI's shape. Raises `Failed` if they have another."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image, UnidentifiedImageError

from hypergen_gateway.conformance.rules import Failed, NotOffered, need

# Status codes of a server that lacks a route or a feature.
_ABSENT = (404, 405, 501)


@dataclass(frozen=True)
class Event:
    """A server-sent event: its raw lines and its parsed data."""

    lines: tuple[str, ...]
    data: Any

    @property
    def type(self) -> str:
        """The event type stated in the data."""
        return str(self.data.get("type"))


def excerpt(response: httpx.Response) -> str:
    """Status code and beginning of a response, for an observation."""
    return f"{response.status_code} {response.text[:120]}".strip()


def json_of(response: httpx.Response) -> Any:
    """The body of a JSON response."""
    kind = response.headers.get("content-type", "no content type")
    need(kind.startswith("application/json"), f"{response.status_code} with content type {kind}")
    return response.json()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in a response: an object with message, type, param and code."""
    body = json_of(response)
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        raise Failed(f"not OpenAI's shape: {excerpt(response)}")
    missing = [key for key in ("message", "type", "param", "code") if key not in error]
    need(not missing, f"error without {', '.join(missing)}: {excerpt(response)}")
    need(isinstance(error["message"], str) and error["message"], f"error without a message: {excerpt(response)}")
    need(isinstance(error["type"], str), f"the error's type is not a string: {excerpt(response)}")
    return error


def expect_error(response: httpx.Response, *statuses: int, param: str | None = None) -> str:
    """Status and message of an error response. Its status must be one of `statuses`; `param`, if given, must match."""
    need(response.status_code in statuses, f"{excerpt(response)}")
    error = error_of(response)
    if param is not None:
        need(error["param"] == param, f"{response.status_code} with param {error['param']!r}: {error['message']}")
    return f"{response.status_code}: {error['message']}"


def offered(response: httpx.Response, field: str | None = None) -> httpx.Response:
    """The response if it is a 200. Raises NotOffered if the route or this value of `field` is not supported."""
    if response.status_code == 200:
        return response
    is_unsupported = response.status_code == 400 and field is not None and error_of(response)["param"] == field
    if response.status_code in _ABSENT or is_unsupported:
        raise NotOffered(excerpt(response))
    raise Failed(excerpt(response))


def images_of(response: httpx.Response) -> list[Image.Image]:
    """The decoded images of a response."""
    need(response.status_code == 200, excerpt(response))
    items = json_of(response)["data"]
    need(all(isinstance(item.get("b64_json"), str) for item in items), f"no b64_json: {excerpt(response)}")
    return [image_in(item["b64_json"]) for item in items]


def image_in(text: str) -> Image.Image:
    """Decode an image from base64."""
    return open_image(base64.b64decode(text, validate=True))


def open_image(content: bytes) -> Image.Image:
    """Decode an image file completely."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise Failed(f"not an image: {content[:20]!r}") from error
    return image


def describe_images(images: Sequence[Image.Image]) -> str:
    """Formats and sizes of images, for an observation."""
    return ", ".join(f"{image.format} {image.width}x{image.height}" for image in images)


def events_of(response: httpx.Response) -> list[Event]:
    """The events of a stream, whose data must be JSON; comments are skipped."""
    need(response.status_code == 200, excerpt(response))
    kind = response.headers.get("content-type", "no content type")
    need(kind.startswith("text/event-stream"), f"{kind}: {response.text[:80]}")
    blocks = response.text.replace("\r\n", "\n").split("\n\n")
    lines = [tuple(line for line in block.split("\n") if line and not line.startswith(":")) for block in blocks]
    return [Event(block, _data(block)) for block in lines if block]


def _data(lines: Sequence[str]) -> Any:
    text = "\n".join(line.removeprefix("data:").lstrip() for line in lines if line.startswith("data:"))
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failed(f"an event whose data is not JSON: {' '.join(lines)[:80]}") from error
