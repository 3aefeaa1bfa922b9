"""Hand-written HTTP content for tests: forms that no well-behaved client sends, and parsing of errors."""

from __future__ import annotations

import base64
from typing import Any

import httpx

BOUNDARY = "a-boundary"


def part(name: str, content: bytes, *, filename: str | None = None, media_type: str | None = None) -> bytes:
    """One part of a form: a file if it has a name, however empty."""
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    lines = [f"--{BOUNDARY}", disposition, *([f"Content-Type: {media_type}"] if media_type else []), "", ""]
    return "\r\n".join(lines).encode() + content + b"\r\n"


def form(*parts: bytes, end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> dict[str, Any]:
    """A form of such parts, as arguments of httpx."""
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    return {"content": b"".join(parts) + end, "headers": {"Content-Type": content_type}}


def data_url(file: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"


def error_of(response: httpx.Response) -> dict[str, str | None]:
    """The error in a response, after checking all that holds for every error."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert 10 < len(body["error"]["message"]) < 500
    return dict(body["error"])
