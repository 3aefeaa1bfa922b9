"""Forms and files that cannot be served: each a 4xx in OpenAI's shape, with the field it is about, at once."""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory, on_loopback
from support.image_files import bomb, file_of, hole, photo
from support.wire import BOUNDARY, data_url, error_of, form, part

EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"

PHOTO = file_of(photo())
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))


def image(content: bytes = PHOTO, name: str = "image") -> bytes:
    return part(name, content, filename="x")


def mask(content: bytes) -> bytes:
    return part("mask", content, filename="x")


PROMPT = part("prompt", b"a fox")

# what the form holds, param, words of the message
WRONG_FORMS: dict[str, tuple[tuple[bytes, ...], str | None, str]] = {
    "no image": ((PROMPT,), "image", "'image' is missing"),
    "no prompt": ((image(),), "prompt", "'prompt' is missing"),
    "nothing": ((), "prompt", "missing"),
    "an empty prompt": ((image(), part("prompt", b"")), "prompt", "1 to 32,000"),
    "a long prompt": ((image(), part("prompt", b"x" * 32_001)), "prompt", "1 to 32,000"),
    "a very long prompt": ((image(), part("prompt", b"x" * 1_100_000)), "prompt", "1,048,576 bytes"),
    "a prompt as a file": ((image(), part("prompt", b"a fox", filename="p.txt")), "prompt", "a file"),
    "a prompt twice": ((image(), PROMPT, PROMPT), "prompt", "twice"),
    "an image as a text": ((PROMPT, part("image", b"x.png")), "image", "PNG, JPEG, WebP, AVIF or GIF file"),
    "an image as a text and a file": ((PROMPT, part("image", b"x.png"), image()), "image", "twice"),
    "an image as a link": (
        (PROMPT, part("image", b"https://example.com/x.png")),
        "image",
        "PNG, JPEG, WebP, AVIF or GIF file",
    ),
    "seventeen images": ((PROMPT, *[image(name="image[]")] * 17), "image", "up to 16"),
    "fifty images": ((PROMPT, *[image(name="image[]")] * 50), None, "Too many files"),
    "two hundred fields": ((PROMPT, *[part(f"x{i}", b"") for i in range(200)]), None, "Too many fields"),
    "a part without a name": ((PROMPT, PROMPT.replace(b' name="prompt"', b"")), None, "name"),
    "an empty image": ((PROMPT, image(b"")), "image", "not an image"),
    "text for an image": ((PROMPT, image(b"hello")), "image", "not an image"),
    "a pdf": ((PROMPT, image(file_of(photo(), "PDF"))), "image", "is PDF. It must be PNG, JPEG, WebP, AVIF or GIF"),
    "half a gif": ((PROMPT, image(file_of(NOISE.quantize(), "GIF")[:9000])), "image", "corrupt or truncated"),
    "a bmp": ((PROMPT, image(file_of(photo(), "BMP"))), "image", "is BMP. It must be PNG, JPEG, WebP, AVIF or GIF"),
    "a tiff": ((PROMPT, image(file_of(photo(), "TIFF"))), "image", "is TIFF. It must be PNG, JPEG, WebP, AVIF or GIF"),
    "an svg": (
        (PROMPT, image(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
        "image",
        "is SVG. It must be PNG, JPEG, WebP, AVIF or GIF",
    ),
    "the head of a png": ((PROMPT, image(b"\x89PNG\r\n\x1a\n")), "image", "corrupt or truncated"),
    "a png without pixels": ((PROMPT, image(PHOTO[:33])), "image", "corrupt or truncated"),
    "half a jpeg": ((PROMPT, image(file_of(NOISE, "JPEG")[:9000])), "image", "corrupt or truncated"),
    "half a webp": ((PROMPT, image(file_of(NOISE, "WEBP")[:9000])), "image", "corrupt or truncated"),
    "a broken second image": ((PROMPT, image(name="image[]"), image(b"x", "image[]")), "image", "not an image"),
    "a decompression bomb": ((PROMPT, image(bomb(20_000))), "image", "16,777,216 pixels"),
    "a larger bomb": ((PROMPT, image(bomb(60_000))), "image", "16,777,216 pixels"),
    "an image just too large": ((PROMPT, image(bomb(4104))), "image", "16,777,216 pixels"),
    "a mask of another size": ((PROMPT, image(), mask(file_of(hole(65, 48)))), "mask", "65x48 instead of 64x48"),
    "a mask on its side": ((PROMPT, image(), mask(file_of(hole(48, 64)))), "mask", "48x64 instead of 64x48"),
    "a mask that hides nothing": ((PROMPT, image(), mask(file_of(photo()))), "mask", "no transparent pixels"),
    "a mask as a jpeg": ((PROMPT, image(), mask(file_of(photo(), "JPEG"))), "mask", "is JPEG. It must be PNG"),
    "a mask as a text": ((PROMPT, image(), part("mask", b"x")), "mask", "transparent where"),
    "rubbish for a mask": ((PROMPT, image(), mask(b"rubbish")), "mask", "not an image"),
    "two masks": ((PROMPT, image(), mask(PHOTO), mask(PHOTO)), "mask", "transparent where"),
    "a bomb for a mask": ((PROMPT, image(), mask(bomb(20_000))), "mask", "16,777,216 pixels"),
}

# field, text
WRONG_TEXTS = [
    ("n", "0"), ("n", "11"), ("n", "two"), ("n", " 2"), ("n", "2.5"), ("n", "1e-1"), ("n", "٢"), ("n", "²"),
    ("n", "true"), ("n", str(2**70)), ("n", "9" * 5000), ("n", "[1]"), ("n", "null"),
    ("size", "4097x64"), ("size", "64"), ("size", "٦٤x٦٤"), ("size", "1e2x64"),
    ("quality", "best"), ("response_format", "xml"), ("output_format", "gif"), ("output_compression", "50"),
    ("output_compression", "-1"), ("background", "transparent"), ("stream", "yes"), ("stream", "1"),
    ("partial_images", "4"), ("seed", "-2"), ("seed", str(2**63)), ("seed", "1.5"),
    ("strength", "1.01"), ("strength", "-0.1"), ("strength", "NaN"), ("strength", "Infinity"), ("strength", "1e999"),
    ("strength", "half"), ("strength", "0,5"), ("guidance_scale", "0"), ("guidance_scale", "21"),
    ("num_inference_steps", "0"), ("num_inference_steps", "151"), ("scheduler", "magic"), ("input_fidelity", "some"),
    ("lora_scale", "11"),
]  # fmt: skip

# a JSON body but for its prompt, param, words of the message
WRONG_JSON: list[tuple[dict[str, Any], str, str]] = [
    ({}, "images", "'images' is missing"),
    ({"images": []}, "images", "1 to 16"),
    ({"images": {}}, "images", "1 to 16"),
    ({"images": "x"}, "images", "not valid base64"),
    ({"images": ["x"]}, "images", "not valid base64"),
    ({"images": [{"image_url": data_url(PHOTO)}] * 17}, "images", "1 to 16"),
    ({"images": [{}]}, "images", "image_url"),
    ({"images": [{"file_id": "file-abc"}]}, "images", "image_url"),
    ({"images": [{"image_url": 7}]}, "images", "1 to 16"),
    ({"images": [{"image_url": "https://example.com/cat.png"}]}, "images", "URLs are never fetched"),
    ({"images": [{"image_url": "http://169.254.169.254/latest/meta-data"}]}, "images", "URLs are never fetched"),
    ({"images": [{"image_url": "file:///etc/passwd"}]}, "images", "URLs are never fetched"),
    ({"images": [{"image_url": ""}]}, "images", "is empty"),
    ({"images": [{"image_url": "data:image/png;base64"}]}, "images", "no comma"),
    ({"images": [{"image_url": "data:image/png,abc"}]}, "images", "not an image"),
    ({"images": [{"image_url": "data:image/png;base64,a!b"}]}, "images", "not valid base64"),
    ({"images": [{"image_url": "data:image/png;base64,абв"}]}, "images", "not valid base64"),
    ({"images": [{"image_url": data_url(b"rubbish")}]}, "images", "not an image"),
    ({"images": [{"image_url": data_url(bomb(20_000))}]}, "images", "16,777,216 pixels"),
    ({"images": [{"image_url": data_url(PHOTO)}], "mask": {"file_id": "file-abc"}}, "mask", "image_url"),
    ({"images": [{"image_url": data_url(PHOTO)}], "mask": data_url(PHOTO)}, "mask", "no transparent"),
    ({"images": [{"image_url": data_url(PHOTO)}], "mask": {"image_url": data_url(PHOTO)}}, "mask", "no transparent"),
    ({"images": [{"image_url": data_url(PHOTO)}], "strength": 2}, "strength", "from 0 to 1"),
    ({"images": [{"image_url": data_url(PHOTO)}], "n": "2"}, "n", "from 1 to 10"),
]


async def refused(client: httpx.AsyncClient, path: str, **request: Any) -> dict[str, str | None]:
    """The error of a request, which came as a 400 after less than a second's work."""
    began = time.process_time()  # whatever else the machine is doing
    response = await client.post(path, **request)
    seconds = time.process_time() - began
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert seconds < 1
    return error


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("what", WRONG_FORMS)
async def test_a_form_that_cannot_be_served_is_a_400(
    client: httpx.AsyncClient, backend: FakeBackend, what: str
) -> None:
    parts, param, words = WRONG_FORMS[what]
    error = await refused(client, EDITS, **form(*parts))
    assert error["param"] == param
    assert words in str(error["message"])
    assert backend.generations == []


@pytest.mark.parametrize(("field", "text"), WRONG_TEXTS)
async def test_a_text_that_stands_for_no_legal_value_is_a_400(
    client: httpx.AsyncClient, backend: FakeBackend, field: str, text: str
) -> None:
    error = await refused(client, EDITS, **form(PROMPT, image(), part(field, text.encode())))
    assert error["param"] == field
    assert backend.generations == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("body", "param", "words"), WRONG_JSON)
async def test_json_that_cannot_be_served_is_a_400(
    client: httpx.AsyncClient, backend: FakeBackend, body: dict[str, Any], param: str, words: str
) -> None:
    error = await refused(client, EDITS, json={"prompt": "a fox"} | body)
    assert error["param"] == param
    assert words in str(error["message"])
    assert backend.generations == []


@pytest.mark.parametrize(
    ("parts", "param"),
    [((), "image"), ((image(b"x"),), "image"), ((image(), image()), "image"), ((image(), part("n", b"11")), "n")],
)
async def test_a_variation_is_refused_in_the_same_way(
    client: httpx.AsyncClient, parts: tuple[bytes, ...], param: str
) -> None:
    assert (await refused(client, VARIATIONS, **form(*parts)))["param"] == param


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", f"multipart/form-data; boundary={BOUNDARY}"),
        (b"", "multipart/form-data"),
        (form(PROMPT)["content"], "multipart/form-data"),
        (form(PROMPT)["content"], "multipart/form-data; boundary=another"),
        (b"no form at all", f"multipart/form-data; boundary={BOUNDARY}"),
        (form(PROMPT, image())["content"][:-100], f"multipart/form-data; boundary={BOUNDARY}"),
        (form(PROMPT, image(), end=b"")["content"], f"multipart/form-data; boundary={BOUNDARY}"),
        (form(PROMPT)["content"], f"multipart/form-data; boundary={'x' * 5000}"),
        (b"--a-boundary\r\n" + b"x: y\r\n" * 20_000, f"multipart/form-data; boundary={BOUNDARY}"),
        (b"--a-boundary\r\nX: " + b"x" * 500_000, f"multipart/form-data; boundary={BOUNDARY}"),
    ],
)
async def test_a_form_that_is_none_is_a_400(client: httpx.AsyncClient, content: bytes, content_type: str) -> None:
    await refused(client, EDITS, content=content, headers={"Content-Type": content_type})


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
async def test_another_content_type_is_a_415(client: httpx.AsyncClient, path: str, content_type: str) -> None:
    response = await client.post(path, content=PHOTO, headers={"Content-Type": content_type})
    assert response.status_code == 415
    assert "multipart/form-data" in str(error_of(response)["message"])


@pytest.mark.parametrize("charset", ["idna", "punycode", "undefined", "utf-16", "zlib", "../x", "x" * 3000])
async def test_a_form_in_another_of_python_s_codecs_is_a_415(client: httpx.AsyncClient, charset: str) -> None:
    sent = form(PROMPT, part("negative_prompt", b"\\" * 100_000), image())
    sent["headers"]["Content-Type"] += f"; charset={charset}"
    response = await client.post(EDITS, **sent)
    assert response.status_code == 415
    assert "UTF-8" in str(error_of(response)["message"])


async def test_a_variation_in_json_is_a_415(client: httpx.AsyncClient) -> None:
    assert (await client.post(VARIATIONS, json={"image": data_url(PHOTO)})).status_code == 415


async def test_json_nested_a_hundred_thousand_deep_is_a_400(client: httpx.AsyncClient) -> None:
    content = b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    error = await refused(client, EDITS, content=content, headers={"Content-Type": "application/json"})
    assert "deep" in str(error["message"])


async def test_a_file_of_fifty_megabytes_is_a_400_and_a_form_over_the_limit_a_413(backend: FakeBackend) -> None:
    # A PNG may be followed by anything: its size is what is wrong with it.
    large = form(PROMPT, image(PHOTO.ljust(50_000_000, b"\0")))
    async with in_memory(create_app(Config(), backend)) as client:
        error = await refused(client, EDITS, **large)
        assert (error["param"], "50 MB" in str(error["message"])) == ("image", True)
    async with in_memory(create_app(Config(max_upload_bytes=1_000_000), backend)) as client:
        response = await client.post(EDITS, **large)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("content_type", [f"multipart/form-data; boundary={BOUNDARY}", "application/json"])
async def test_a_body_of_a_gigabyte_is_answered_early_and_memory_stays_flat(
    backend: FakeBackend, declared: bool, content_type: str
) -> None:
    chunk = bytes(1 << 16)
    length = f"Content-Length: {1 << 30}" if declared else "Transfer-Encoding: chunked"
    head = f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n{length}\r\n\r\n".encode()
    config = Config(max_upload_bytes=8 << 20, max_json_upload_bytes=4 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, sent = time.perf_counter(), 0
    async with on_loopback(create_app(config, backend)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(head)
        status = asyncio.ensure_future(reader.readline())
        for content in itertools.chain([image(b"").removesuffix(b"\r\n")], itertools.repeat(chunk)):
            writer.write(content if declared else b"%x\r\n%b\r\n" % (len(content), content))
            await writer.drain()
            sent += len(content)
            if status.done() or sent >= 1 << 30:
                break
        assert b"413" in await status
        seconds = time.perf_counter() - began
        assert b'"code":"request_too_large"' in await reader.read(10_000)
        writer.close()
    assert sent < 64 << 20
    assert seconds < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


async def test_megabytes_of_base64_that_are_no_image_are_a_400(client: httpx.AsyncClient) -> None:
    error = await refused(client, EDITS, json={"prompt": "a", "images": [{"image_url": data_url(bytes(5_000_000))}]})
    assert "not an image" in str(error["message"])
