"""GET, POST and DELETE /v1/loras."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.generation.backend import Lora
from support.fake_backend import MODEL, FakeBackend, in_memory

INK = Lora(name="ink", scale=0.8, columns=4, changes=("text_encoder", "unet"))
PEN = Lora(name="pen", scale=1.0, columns=8, in_pool=False)
CLAY = Lora(name="clay", scale=1.0, is_merged=True)


async def test_loras_are_listed_with_those_that_cannot_be_served(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.description = replace(MODEL, loras=(INK, CLAY, replace(CLAY, scale=0.5), PEN))
    backend.rejected_loras = {"oil": "oil.safetensors: not a safetensors file"}
    assert (await client.get("/v1/loras")).json() == {
        "object": "list",
        "data": [
            {
                "object": "lora",
                "name": "ink",
                "default_scale": 0.8,
                "rank": 4,
                "in_pool": True,
                "changes": ["text_encoder", "unet"],
            },
            {"object": "lora", "name": "clay", "default_scale": 1.0, "changes": []},
            {"object": "lora", "name": "pen", "default_scale": 1.0, "rank": 8, "in_pool": False, "changes": []},
            {"object": "lora", "name": "oil", "changes": [], "error": "oil.safetensors: not a safetensors file"},
        ],
    }


HEADER = json.dumps({"unet.x.lora_A.weight": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
FILE = len(HEADER).to_bytes(8, "little") + HEADER + b"\0\0"
ADMIN, OTHER = {"Authorization": "Bearer admin-key"}, {"Authorization": "Bearer other-key"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "loras"
    made.mkdir()
    return made


@pytest.fixture
def config(folder: Path) -> Config:
    keys = folder.with_name("keys")
    keys.write_text("anna: admin-key\nben: other-key\nunnamed-key\n")
    return Config(api_key_file=keys, lora_dir=folder, lora_admins=("anna",), max_lora_bytes=10_000)


@pytest.fixture
async def server(config: Config, backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(config, backend)) as client:
        yield client


def held(folder: Path) -> dict[str, bytes]:
    """The folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def form(name: str = "ink", file: bytes = FILE) -> dict[str, Any]:
    return {"data": {"name": name}, "files": {"file": file}}


async def test_a_key_with_that_right_adds_replaces_and_removes_a_file(server: httpx.AsyncClient, folder: Path) -> None:
    (folder / "my ink!.safetensors").write_bytes(b"former")
    for name, file in (("ink", "ink"), ("my-ink", "my ink!")):
        added = await server.post("/v1/loras", headers=ADMIN, **form(name))
        assert (added.status_code, added.json()) == (202, {"object": "lora", "name": name, "changes": []})
        assert held(folder)[f"{file}.safetensors"] == FILE
    assert len(held(folder)) == 2, "the second one has replaced the file that requests name so"
    for name in ("ink", "my-ink"):
        removed = await server.delete(f"/v1/loras/{name}", headers=ADMIN)
        assert (removed.status_code, removed.json()) == (200, {"object": "lora", "name": name, "deleted": True})
    assert not held(folder)
    again = await server.delete("/v1/loras/ink", headers=ADMIN)
    assert (again.status_code, again.json()["error"]["param"]) == (404, "name")


async def test_the_name_of_a_lora_that_was_given_at_the_start_is_taken(
    server: httpx.AsyncClient, backend: FakeBackend, folder: Path
) -> None:
    backend.description = replace(MODEL, loras=(INK, replace(PEN, is_of_folder=True)))
    refused = await server.post("/v1/loras", headers=ADMIN, **form("ink"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
    assert not held(folder)
    assert (await server.post("/v1/loras", headers=ADMIN, **form("pen"))).status_code == 202


@pytest.mark.parametrize("headers", [OTHER, {"Authorization": "Bearer unnamed-key"}])
async def test_no_other_key_does(headers: dict[str, str], server: httpx.AsyncClient, folder: Path) -> None:
    (folder / "clay.safetensors").write_bytes(FILE)

    async def body() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        pytest.fail("the body was read")

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for answer in (
        await server.post("/v1/loras", headers=headers | kind, content=body()),
        await server.delete("/v1/loras/clay", headers=headers),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    assert held(folder) == {"clay.safetensors": FILE}


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"files": {"file": FILE}}, 400, "name"),
        ({"data": {"name": "ink"}, "files": {"other": FILE}}, 400, "file"),
        ({"data": {"name": "ink", "file": "text"}, "files": {"x": b""}}, 400, "file"),
        *((form(name), 400, "name") for name in ("../ink", "a/b", ".ink", "ink.", "-ink", "ink ", "\u58a8", "x" * 65)),
        (form(file=b""), 400, "file"),
        (form(file=b"PK\x03\x04 a zip archive"), 400, "file"),
        (form(file=(2**62).to_bytes(8, "little") + b"{}"), 400, "file"),
        (form(file=(3).to_bytes(8, "little") + b"[1]"), 400, "file"),
        (form(file=(7).to_bytes(8, "little") + b'{"a":1}'), 400, "file"),
        (form(file=FILE[:-1]), 400, "file"),
        (form(file=FILE + bytes(10_000)), 413, None),
        ({"json": {"name": "ink"}}, 415, None),
    ],
)
async def test_a_form_of_no_use_is_refused_and_leaves_nothing(
    given: dict[str, Any], status: int, param: str | None, server: httpx.AsyncClient, folder: Path
) -> None:
    answer = await server.post("/v1/loras", headers=ADMIN, **given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert not held(folder)


async def test_a_file_that_cannot_be_written_leaves_nothing(
    server: httpx.AsyncClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    answer = await server.post("/v1/loras", headers=ADMIN, **form())
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
    assert "507" in (await server.get("/openapi.json")).json()["paths"]["/v1/loras"]["post"]["responses"]
    assert not held(folder)


@pytest.mark.parametrize("name", ["ink.safetensors", "INK.SafeTensors"])
async def test_the_name_of_a_file_is_not_taken_for_that_of_a_lora(
    name: str, server: httpx.AsyncClient, folder: Path
) -> None:
    (folder / "ink.safetensors").write_bytes(b"former")
    answer = await server.post("/v1/loras", headers=ADMIN, **form(name))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    assert "without .safetensors at the end" in answer.json()["error"]["message"]
    assert held(folder) == {"ink.safetensors": b"former"}


@pytest.mark.parametrize("name", ["..%2F..%2Fkeys", "%2E%2E", "a%00b", "."])
async def test_no_name_leads_out_of_the_folder(name: str, server: httpx.AsyncClient, folder: Path) -> None:
    assert (await server.delete(f"/v1/loras/{name}", headers=ADMIN)).status_code in (404, 405)
    assert "keys" in held(folder.parent)


async def test_a_server_without_a_folder_has_nowhere_to_put_them(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/loras", **form())
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("missing", [{"api_key_file": None}, {"lora_dir": None}], ids=str)
def test_the_right_needs_named_keys_and_a_folder(missing: dict[str, Any], config: Config) -> None:
    with pytest.raises(ValueError, match="--lora-admin needs --lora-dir and --api-key-file"):
        replace(config, **missing)
