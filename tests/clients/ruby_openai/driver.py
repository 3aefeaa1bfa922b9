"""What ruby-openai 8.3 puts on the wire: files without a type (an empty header), a list of images as `image[0]`."""

import json
from pathlib import Path

from clients.raw import KEY, form, image_of, post, text

BOUNDARY = "-----------RubyMultipartPost-8f14e45fceea167a5a36dedd4bea2543"
HEADERS = {
    "Content-Type": "application/json",
    "Authorization": f"Bearer {KEY}",
    "User-Agent": "Faraday v2.14.0",
    "Accept-Encoding": "gzip;q=1.0,deflate;q=0.6,identity;q=0.3",
    "Accept": "*/*",
}
FORM = HEADERS | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def generate(prompt: str) -> str:
    body = {"prompt": prompt, "model": "dall-e-3", "size": "1024x1792", "quality": "standard"}
    return image_of(post("/images/generations", HEADERS, json.dumps(body).encode()))


def file(name: str, path: str) -> tuple[list[str], bytes]:
    content = Path(path).read_bytes()
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{Path(path).name}"'
    length = f"Content-Length: {len(content)}"
    return [disposition, length, "Content-Type: ", "Content-Transfer-Encoding: binary"], content


def edit(prompt: str, image: str, mask: str) -> str:
    parts = [text("model", "gpt-image-1"), text("prompt", prompt), file("mask", mask), file("image[0]", image)]
    return image_of(post("/images/edits", FORM, form(BOUNDARY, *parts)))


def vary(image: str) -> str:
    return image_of(post("/images/variations", FORM, form(BOUNDARY, file("image", image), text("n", "1"))))
