"""No path and no URL from a request is ever opened: Python itself tells what it opens, connects to and starts."""

from __future__ import annotations

import itertools
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import pytest

from hypergen_gateway.api.fields import EditForm, EditRequest, ImageFields, ImageRequest, VariationForm
from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory
from support.image_files import file_of, photo
from support.wire import data_url, form, part

# What the interpreter reports of files, connections, names, programs and libraries (docs: "Audit events table").
OPENING = frozenset(
    {
        *("open", "os.listdir", "os.scandir", "os.chdir", "os.rename", "os.remove", "os.mkdir", "glob.glob", "import"),
        *("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"),
        *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen", "pickle.find_class"),
    }
)
OWN_FOLDER = f"{tempfile.gettempdir()}/hypergen-links-"
IMAGE = file_of(photo(16, 16))
IMAGE_URL = data_url(IMAGE)
heard: list[tuple[str, Any]] | None = None


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    """A hook that cannot be taken out again: it hears nothing while `heard` is None."""
    place = arguments[0] if arguments else None
    # A gateway of another test in this process may be clearing up its own folder just now, in part by numbers.
    if heard is not None and event in OPENING and not isinstance(place, int) and OWN_FOLDER not in str(place):
        heard.append((event, place))


sys.addaudithook(listen)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Somebody who would notice a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def places(listener: socket.socket, secret: Path) -> list[str]:
    """Where a careless server would look."""
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    return [
        str(secret),
        f"file://{secret}",
        f"../../../../../../..{secret}",
        f"{address}/image.png",
        f"{address}/image.png?{IMAGE_URL}",
        "//169.254.169.254/latest/meta-data",
        "s3://bucket/key",
        "\\\\127.0.0.1\\share\\x.safetensors",
        f"|cat {secret}",
    ]


def texts_of(kind: type[ImageFields]) -> list[str]:
    """The fields of a body that take a text."""
    annotations = {name: described.annotation for name, described in kind.model_fields.items()}
    return [name for name, annotation in annotations.items() if str in (annotation, *get_args(annotation))]


def requests_with(text: str) -> Iterator[dict[str, Any]]:
    """Every request that carries the text somewhere, as arguments of httpx."""
    generations, edits, variations = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
    image = {"image_url": IMAGE_URL}
    good = {"prompt": "a fox"}
    for field in [*texts_of(ImageRequest), "image_url", "image", "style", "unknown"]:
        yield {"url": generations, "json": good | {field: text}}
    for field in [*texts_of(EditRequest), "unknown"]:
        yield {"url": edits, "json": good | {"images": [image], field: text}}
    for images, mask in itertools.product(({"image_url": text}, {"file_id": text}, text, image), (None, text, "mask")):
        named = {} if mask is None else {"mask": {"image_url": text} if mask == "mask" else text}
        yield {"url": edits, "json": good | {"images": [images]} | named}
    for url, kind in ((edits, EditForm), (variations, VariationForm)):
        for field in [*texts_of(kind), "image", "mask", "unknown"]:
            # Variations are links by default, for which the server writes a file of its own.
            texts = {**(good if url == edits else {"response_format": "b64_json"}), field: text}
            parts = [part(name, value.encode()) for name, value in texts.items()]
            yield {"url": url} | form(part("image", IMAGE, filename=text), *parts)
            yield {"url": url} | form(part(text, IMAGE, filename="x.png"), *parts)
            yield {"url": url} | form(part("image", text.encode(), filename="x.png", media_type=text), *parts)
    for header in ("Host", "Origin", "Referer", "X-Forwarded-Host", "X-Request-Id", "Idempotency-Key", "Authorization"):
        yield {"url": generations, "json": good, "headers": {header: text}}
    for content_type in (f"application/json; charset={text}", f"multipart/form-data; boundary=x; charset={text}"):
        yield {"url": edits, "content": b'{"prompt": "a"}', "headers": {"Content-Type": content_type}}


def reads_with(text: str) -> Iterator[str]:
    """Every address that carries it."""
    for path in (
        "/v1/models/{}",
        "/files/{}",
        "/files/{}?expires=9999999999&signature={}",
        "/web/{}",
        "/docs?{}",
        "/{}",
    ):
        for written in (quote(text), quote(text, safe=""), quote(text).replace(".", "%2e")):
            yield f"http://gateway{path.replace('{}', written)}"


def test_whatever_is_opened_would_be_heard(tmp_path: Path, listener: socket.socket) -> None:
    global heard
    heard = []
    (tmp_path / "file").touch()
    (tmp_path / "file").read_bytes()
    socket.create_connection(listener.getsockname()).close()
    told, heard = heard, None
    assert {event for event, _ in told} >= {"open", "socket.connect"}


async def test_no_text_of_any_field_is_taken_for_a_place(tmp_path: Path, listener: socket.socket) -> None:
    global heard
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGE)
    backend, seen = FakeBackend(), 0
    async with in_memory(create_app(Config(link_folder=tmp_path / "links"), backend)) as client:
        for request in requests_with("a text"):
            await client.post(**request)  # whatever is imported late is there now
        for address in reads_with("a text"):
            await client.get(address)
        for text in places(listener, secret):
            for request in requests_with(text):
                heard = []
                answer = await client.post(**request)
                opened, heard = heard, None
                assert opened == [], request
                assert answer.status_code in (200, 400, 403, 415), (request, answer.text)
                assert str(tmp_path) not in answer.text.replace(text, "")
                seen += answer.status_code == 200
            for address in reads_with(text):
                heard = []
                answer = await client.get(address)
                opened, heard = heard, None
                assert opened == [], address
                assert answer.status_code in (200, 404)
                assert answer.content != secret.read_bytes()
    assert seen > 100  # most went all the way to an image
    with pytest.raises(BlockingIOError):
        listener.accept()
