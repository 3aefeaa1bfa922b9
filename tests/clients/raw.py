"""Requests byte for byte, for clients in languages whose packages are not installed here: read in their sources."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping
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


def form(boundary: str, *parts: tuple[list[str], bytes]) -> bytes:
    """A form of parts, each as the lines of its head and its content."""
    encoded = ["\r\n".join([f"--{boundary}", *head, "", ""]).encode() + content + b"\r\n" for head, content in parts]
    return b"".join(encoded) + f"--{boundary}--\r\n".encode()
