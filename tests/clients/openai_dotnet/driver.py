"""What OpenAI's .NET client 2.13 puts on the wire: a boundary of 70 characters with `=` in it, names without quotes."""

import json
from pathlib import Path

from clients.raw import KEY, form, image_of, post

BOUNDARY = "0=1AZ_az9=bYcXdWeVfUgThSiRjQkPlOmNnMoLpKqJrIsHtGuFvEwDxCyBzA=0_1a2b3c4"
HEADERS = {
    "Accept": "application/json, text/event-stream",
    "User-Agent": "OpenAI/2.13.0 (.NET 9.0.0; Linux)",
    "Authorization": f"Bearer {KEY}",
}
JSON = HEADERS | {"Content-Type": "application/json"}
FORM = HEADERS | {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"'}


def generate(prompt: str) -> str:
    body = {"prompt": prompt, "model": "dall-e-3", "quality": "hd", "size": "1792x1024", "response_format": "b64_json"}
    return image_of(post("/images/generations", JSON, json.dumps(body).encode()))


def text(name: str, value: str) -> tuple[list[str], bytes]:
    head = ["Content-Type: text/plain; charset=utf-8", f"Content-Disposition: form-data; name={name}"]
    return head, value.encode()


def file(name: str, path: str) -> tuple[list[str], bytes]:
    known_as = f"{name}.png"
    disposition = f"form-data; name={name}; filename={known_as}; filename*=utf-8''{known_as}"
    return [f"Content-Disposition: {disposition}"], Path(path).read_bytes()


def edit(prompt: str, image: str, mask: str) -> str:
    parts = [file("image", image), text("prompt", prompt), file("mask", mask), text("model", "dall-e-2")]
    return image_of(post("/images/edits", FORM, form(BOUNDARY, *parts, text("size", "512x512"))))


def vary(image: str) -> str:
    body = form(BOUNDARY, file("image", image), text("model", "dall-e-2"), text("n", "1"))
    return image_of(post("/images/variations", FORM | {"Accept": "application/json"}, body))
