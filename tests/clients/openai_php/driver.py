"""What openai-php/client 0.20 puts on the wire by Guzzle: a Content-Length in every part of a form."""

import json
from pathlib import Path

from clients.raw import KEY, form, image_of, post

BOUNDARY = "6745c0de1a2b3c.12345678"
HEADERS = {"User-Agent": "GuzzleHttp/7", "Authorization": f"Bearer {KEY}"}
JSON = HEADERS | {"Content-Type": "application/json"}
FORM = HEADERS | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def generate(prompt: str) -> str:
    body = {"model": "dall-e-3", "prompt": prompt, "n": 1, "size": "1024x1024", "response_format": "url"}
    return image_of(post("/images/generations", JSON, json.dumps(body).encode()))


def text(name: str, value: str) -> tuple[list[str], bytes]:
    return [f'Content-Disposition: form-data; name="{name}"', f"Content-Length: {len(value)}"], value.encode()


def file(name: str, path: str) -> tuple[list[str], bytes]:
    content = Path(path).read_bytes()
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{Path(path).name}"'
    return [disposition, f"Content-Length: {len(content)}", "Content-Type: image/png"], content


FIELDS = [text("n", "1"), text("size", "256x256"), text("response_format", "url")]


def edit(prompt: str, image: str, mask: str) -> str:
    body = form(BOUNDARY, file("image", image), file("mask", mask), text("prompt", prompt), *FIELDS)
    return image_of(post("/images/edits", FORM, body))


def vary(image: str) -> str:
    return image_of(post("/images/variations", FORM, form(BOUNDARY, file("image", image), *FIELDS)))
