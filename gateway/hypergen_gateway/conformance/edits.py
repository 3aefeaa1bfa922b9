"""Rules about POST /v1/images/edits and /v1/images/variations, with forms as OpenAI's clients send them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
from PIL import Image, ImageChops

from hypergen_gateway.conformance.rules import Area, need
from hypergen_gateway.conformance.server import EDITS, VARIATIONS, File, Server
from hypergen_gateway.conformance.shapes import (
    describe_images,
    events_of,
    expect_error,
    image_in,
    images_of,
    json_of,
    offered,
)

AREA = Area("edits")
VARIATION = Area("variations")
_BOUNDARY = "----conformance"


@AREA.rule("`image` and a prompt return an image")
def _(server: Server) -> str:
    return describe_images(images_of(offered(server.edit([("image", _image_file(server))]))))


@AREA.rule("`image[]` works like `image` and can be repeated")
def _(server: Server) -> str:
    once = images_of(offered(server.edit([("image[]", _image_file(server))])))
    twice = images_of(offered(server.edit([("image[]", _image_file(server))] * 2)))
    return describe_images([*once, *twice])


@AREA.rule("raw bytes are accepted as `upload` of type application/octet-stream")
def _(server: Server) -> str:
    _, content, _ = _image_file(server)
    return describe_images(
        images_of(offered(server.edit([("image", ("upload", content, "application/octet-stream"))])))
    )


@AREA.rule("a file before the prompt, a path as file name and a chunked body are accepted")
def _(server: Server) -> str:
    _, content, _ = _image_file(server)
    body = server.body({"n": 1})
    headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    return describe_images(
        images_of(offered(server.send("POST", EDITS, content=_chunks(content, body), headers=headers)))
    )


@AREA.rule("numbers and booleans are accepted as text: `n` 2, `stream` false")
def _(server: Server) -> str:
    images = images_of(offered(server.edit([("image", _image_file(server))], n=2, stream=False, partial_images=0)))
    need(len(images) == 2, f"{len(images)} images")
    return describe_images(images)


@AREA.rule("JPEG and WebP input images are accepted")
def _(server: Server) -> str:
    images = []
    for name in ("jpeg", "webp"):
        file = (f"image.{name}", _bytes_of(_image(server).convert("RGB"), name), f"image/{name}")
        images += images_of(offered(server.edit([("image", file)])))
    return describe_images(images)


@AREA.rule("a mask is accepted")
def _(server: Server) -> str:
    return describe_images(images_of(_masked(server)))


@AREA.rule("the image is unchanged outside the mask", extension=True)
def _(server: Server) -> str:
    before = _image(server).convert("RGB")
    (after,) = images_of(_masked(server))
    need(after.size == before.size, describe_images([after]))
    left = (0, 0, before.width // 2, before.height)
    difference = ImageChops.difference(before.crop(left), after.convert("RGB").crop(left))
    worst = max(difference.tobytes())
    need(worst <= 2, f"differs by up to {worst} of 255")
    return f"differs by at most {worst} of 255"


@AREA.rule("`usage` counts the tokens of the input image")
def _(server: Server) -> str:
    usage = json_of(offered(server.edit([("image", _image_file(server))]))).get("usage")
    need(usage, "no usage")
    tokens = usage["input_tokens_details"]["image_tokens"]
    need(tokens > 0, str(usage))
    return f"{tokens} tokens"


@AREA.rule("JSON with the image as a data URL is accepted")
def _(server: Server) -> str:
    _, content, _ = _image_file(server)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    response = server.send("POST", EDITS, json=server.body({"images": [{"image_url": url}]}))
    return describe_images(images_of(offered(response)))


@AREA.rule("`stream` sends previews, then image_edit.completed")
def _(server: Server) -> str:
    response = offered(server.edit([("image", _image_file(server))], stream=True, partial_images=1), "stream")
    types = [event.type for event in events_of(response)]
    need(types[-1] == "image_edit.completed", ", ".join(types))
    need(types[:-1] == ["image_edit.partial_image"], ", ".join(types))
    image_in(events_of(response)[-1].data["b64_json"])
    return ", ".join(types)


@AREA.rule("without an image: 400, param `image`")
def _(server: Server) -> str:
    _need_route(server)
    return expect_error(server.edit([("nothing", ("x.txt", b"x", "text/plain"))]), 400, param="image")


@AREA.rule("without a prompt: 400, param `prompt`")
def _(server: Server) -> str:
    _need_route(server)
    return expect_error(server.edit([("image", _image_file(server))], prompt=None), 400, param="prompt")


@AREA.rule("a file that is not an image: 400, param `image`")
def _(server: Server) -> str:
    _need_route(server)
    return expect_error(
        server.edit([("image", ("image.png", b"\x89PNG\r\n\x1a\n rubbish", "image/png"))]), 400, param="image"
    )


@AREA.rule("a mask of another size: 400, param `mask`")
def _(server: Server) -> str:
    _need_route(server)
    mask = ("mask.png", _bytes_of(Image.new("RGBA", (16, 24))), "image/png")
    return expect_error(server.edit([("image", _image_file(server)), ("mask", mask)]), 400, param="mask")


@AREA.rule("text instead of a number: 400, param `n`")
def _(server: Server) -> str:
    _need_route(server)
    return expect_error(server.edit([("image", _image_file(server))], n="two"), 400, param="n")


@VARIATION.rule("an image alone returns an image")
def _(server: Server) -> str:
    return describe_images(images_of(offered(server.edit([("image", _image_file(server))], path=VARIATIONS))))


@VARIATION.rule("`n: 2` returns two different images")
def _(server: Server) -> str:
    images = images_of(offered(server.edit([("image", _image_file(server))], path=VARIATIONS, n=2)))
    need(len(images) == 2 and images[0].tobytes() != images[1].tobytes(), describe_images(images))
    return describe_images(images)


@VARIATION.rule("without an image: 400, param `image`")
def _(server: Server) -> str:
    _need_route(server, VARIATIONS)
    response = server.edit([("nothing", ("x.txt", b"x", "text/plain"))], path=VARIATIONS)
    return expect_error(response, 400, param="image")


def _need_route(server: Server, path: str = EDITS) -> None:
    """Raise NotOffered if there is no such route, judging by the response to an empty request."""
    response = server.send("POST", path)
    if response.status_code in (404, 405, 501):
        offered(response)


def _image(server: Server) -> Image.Image:
    """An image that the server generated, so its size is one that the server supports."""
    return images_of(server.image)[0]


def _image_file(server: Server) -> File:
    return ("image.png", _bytes_of(_image(server)), "image/png")


def _masked(server: Server) -> httpx.Response:
    """The response to an edit of the right half of an image."""
    image = _image(server)
    mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (image.width // 2, 0, image.width, image.height))
    files = [("image", _image_file(server)), ("mask", ("mask.png", _bytes_of(mask), "image/png"))]
    return offered(server.edit(files), "mask")


def _bytes_of(image: Image.Image, name: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=name.upper())
    return buffer.getvalue()


def _chunks(content: bytes, body: dict[str, Any]) -> Iterator[bytes]:
    disposition = 'Content-Disposition: form-data; name="image"; filename="/home/somebody/an image.png"'
    yield f"--{_BOUNDARY}\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n".encode()
    yield content[: len(content) // 2]
    yield content[len(content) // 2 :]
    for name, value in body.items():
        yield f'\r\n--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode()
    yield f"\r\n--{_BOUNDARY}--\r\n".encode()
