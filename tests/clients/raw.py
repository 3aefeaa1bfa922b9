"""Requests byte for byte, for clients in languages whose packages are not installed here: read in their sources."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BASE = urlsplit(os.environ["OPENAI_BASE_URL"])
KEY = os.environ["OPENAI_API_KEY"]


def post(path: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """Sends these headers, in this order, beside Host alone, and returns the JSON of the answer."""
    connection = http.client.HTTPConnection(BASE.hostname or "", BASE.port, timeout=120)
    try:
        connection.putrequest("POST", BASE.path + path, skip_accept_encoding=True)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{response.status} {content.decode(errors='replace')}")
    return dict(json.loads(content))


def image_of(answer: Mapping[str, Any]) -> str:
    image = answer["data"][0]
    return str(image.get("b64_json") or image["url"])


Part = tuple[list[str], bytes]


def text(name: str, value: str) -> Part:
    """A field of a form, as most clients send it."""
    return [f'Content-Disposition: form-data; name="{name}"'], value.encode()


def file(name: str, path: str, *head: str) -> Part:
    """A file of a form, as most clients send it, with further lines for its head."""
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{Path(path).name}"'
    return [disposition, *head], Path(path).read_bytes()


def form(boundary: str, *parts: Part) -> bytes:
    """A form of parts, each as the lines of its head and its content."""
    encoded = ["\r\n".join([f"--{boundary}", *head, "", ""]).encode() + content + b"\r\n" for head, content in parts]
    return b"".join(encoded) + f"--{boundary}--\r\n".encode()
