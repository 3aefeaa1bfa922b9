"""What OpenAI's Go client 3.52 puts on the wire."""

import json

from clients.raw import KEY, file, form, image_of, post, text

BOUNDARY = "5a1f0c3b9d8e7f6a5b4c3d2e1f0a9b8c7d6e5f4a3b2c1d0e9f8a7b6c5d4e"
HEADERS = {
    "User-Agent": "OpenAI/Go 3.52.0",
    "Accept": "application/json",
    "Authorization": f"Bearer {KEY}",
    "X-Stainless-Arch": "x64",
    "X-Stainless-Lang": "go",
    "X-Stainless-Os": "Linux",
    "X-Stainless-Package-Version": "3.52.0",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Runtime": "go",
    "X-Stainless-Runtime-Version": "go1.25.1",
    "Accept-Encoding": "gzip",
}
JSON = HEADERS | {"Content-Type": "application/json"}
# An open file keeps its name; any other reader is sent as `anonymous_file`.
BINARY = "Content-Type: application/octet-stream"
FORM = HEADERS | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def generate(prompt: str) -> str:
    body = {"prompt": prompt, "n": 1, "model": "dall-e-3", "response_format": "url"}
    return image_of(post("/images/generations", JSON, json.dumps(body).encode()))


def edit(prompt: str, image: str, mask: str) -> str:
    parts = [
        file("image[]", image, BINARY),
        text("prompt", prompt),
        file("mask", mask, BINARY),
        text("model", "gpt-image-1"),
    ]
    return image_of(post("/images/edits", FORM, form(BOUNDARY, *parts)))


def vary(image: str) -> str:
    return image_of(post("/images/variations", FORM, form(BOUNDARY, file("image", image, BINARY))))
