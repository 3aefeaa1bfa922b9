"""What sashabaranov's go-openai 1.42 puts on the wire: in forms, the fields that were left empty are there, too."""

import json

from clients.raw import KEY, file, form, image_of, post, text

BOUNDARY = "b2d1c0f9e8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b8c7d6e5f4a3"
HEADERS = {"User-Agent": "Go-http-client/1.1", "Accept": "application/json", "Authorization": f"Bearer {KEY}"}
JSON = HEADERS | {"Content-Type": "application/json"}
PNG = "Content-Type: image/png"
FORM = HEADERS | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def generate(prompt: str) -> str:
    body = {"prompt": prompt, "n": 1, "size": "256x256", "response_format": "url"}
    return image_of(post("/images/generations", JSON, json.dumps(body).encode()))


def edit(prompt: str, image: str, mask: str) -> str:
    files = [file("image", image, PNG), file("mask", mask, PNG)]
    fields = [text("prompt", prompt), text("n", "1"), text("size", ""), text("response_format", "")]
    return image_of(post("/images/edits", FORM, form(BOUNDARY, *files, *fields)))


def vary(image: str) -> str:
    fields = [text("n", "1"), text("size", ""), text("response_format", "")]
    return image_of(post("/images/variations", FORM, form(BOUNDARY, file("image", image, PNG), *fields)))
