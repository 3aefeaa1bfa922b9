"""API keys: how a file says them, how it is followed, and that nobody can read them off us."""

from __future__ import annotations

import hmac
import logging
import os
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.http.keys import BadKeysError, Keys, parse_keys
from hypergen_gateway.observability.logs import JsonLines
from support.fake_backend import FakeBackend, in_memory

URL = "/v1/models"
FILE = """\
# Who may generate.
alice: sk-alice-2026

  bob@example.com:   sk-bob:with-a-colon
sk-nobody-s
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def write(file: Path, content: bytes | None) -> None:
    """None removes it."""
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def replace_as_kubernetes_does(file: Path, content: bytes) -> None:
    (file.parent / "next").write_bytes(content)
    file.unlink()
    file.symlink_to("next")


async def statuses(client: httpx.AsyncClient, *keys: str) -> list[int]:
    return [(await client.get(URL, headers=bearer(key))).status_code for key in keys]


class TestFile:
    def test_it_has_a_key_a_line_with_a_name_or_without(self) -> None:
        keys = Keys()
        keys._from_file = parse_keys(FILE)
        names = {}
        for key in ("sk-alice-2026", "sk-bob:with-a-colon", "sk-nobody-s"):
            found = keys.find(key.encode())
            assert found is not None
            names[key] = found.name
        assert list(names.values()) == ["alice", "bob@example.com", None]
        assert keys.find(b"alice:") is None
        assert keys.find(b"#") is None

    @pytest.mark.parametrize(
        "line", ["sk-alice alice", "alice sk-alice", "a b: sk-alice", ": sk-alice", 'a"b: sk-alice', "x" * 65 + ": sk"]
    )
    def test_a_line_that_is_neither_is_named_by_its_number_alone(self, line: str) -> None:
        with pytest.raises(BadKeysError) as raised:
            parse_keys(f"# one\nsk-good\n{line}\n")
        assert str(raised.value) == "line 3 must be KEY or NAME: KEY"

    @pytest.mark.parametrize("text", ["", " \n", "# sk-none\n"])
    def test_no_key_is_no_way_to_open_the_server(self, text: str) -> None:
        with pytest.raises(BadKeysError, match="no key"):
            parse_keys(text)

    def test_a_huge_one_is_not_read_whole(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_bytes(b"#" * (2 << 20))
        with pytest.raises(BadKeysError, match="megabyte"):
            Keys(file=file)


class TestRotation:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "keys"
        file.write_text("old\n")
        return file

    @pytest.fixture
    async def client(self, file: Path, backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
        async with in_memory(create_app(Config(api_key_file=file), backend)) as client:
            yield client

    async def test_a_changed_file_counts_from_the_next_request_on(self, client: httpx.AsyncClient, file: Path) -> None:
        assert await statuses(client, "old", "new") == [200, 401]
        write(file, b"old\nnew\n")
        assert await statuses(client, "old", "new") == [200, 200]
        write(file, b"new\n")
        assert await statuses(client, "old", "new") == [401, 200]

    async def test_a_file_that_is_replaced_as_kubernetes_does_counts_too(
        self, client: httpx.AsyncClient, file: Path
    ) -> None:
        replace_as_kubernetes_does(file, b"new\n")
        assert await statuses(client, "old", "new") == [401, 200]

    @pytest.mark.parametrize("broken", [b"", b"two words\n", b"\xff\xfe", None])
    async def test_a_broken_one_keeps_the_keys_and_says_so_once(
        self, client: httpx.AsyncClient, file: Path, caplog: pytest.LogCaptureFixture, broken: bytes | None
    ) -> None:
        write(file, broken)
        assert await statuses(client, "old", "old", "two", "words", "") == [200, 200, 401, 401, 401]
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert "keeping the previous API keys" in line
        assert "two" not in line
        write(file, b"mended\n")
        assert await statuses(client, "old", "mended") == [401, 200]


class TestComparison:
    def test_every_key_is_compared_in_constant_time_whichever_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = Keys(["first", "a much longer second one", "third"])
        compared: list[tuple[int, int]] = []
        real = hmac.compare_digest

        def watched(one: bytes, other: bytes) -> bool:
            compared.append((len(one), len(other)))
            return real(one, other)

        monkeypatch.setattr(hmac, "compare_digest", watched)
        for given in (b"first", b"third", b"wrong", b"", b"x" * 10_000, b"\xff"):
            compared.clear()
            keys.find(given)
            assert compared == [(32, 32)] * 3

    async def test_several_keys_open_and_each_has_work_of_its_own(self, backend: FakeBackend) -> None:
        async with in_memory(create_app(Config(api_key=("one", "two")), backend)) as client:
            assert await statuses(client, "one", "two", "three", "onetwo", "one,two") == [200, 200, 401, 401, 401]
            for key in ("one", "two", "one"):
                headers = {**bearer(key), "Idempotency-Key": "the-same"}
                response = await client.post("/v1/images/generations", json={"prompt": "a fox"}, headers=headers)
                assert response.status_code == 200
        assert len(backend.generations) == 2


class TestAzureHeader:
    async def test_it_is_compared_and_named_as_any_other(
        self, backend: FakeBackend, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        caplog.set_level(logging.INFO, "hypergen_gateway.access")
        file = tmp_path / "keys"
        write(file, FILE.encode())
        async with in_memory(create_app(Config(api_key_file=file), backend)) as client:
            assert (await client.get(URL, headers={"api-key": "sk-alice-2026"})).status_code == 200
        assert [record.getMessage().split()[-1] for record in caplog.records] == ["alice"]

    async def test_work_is_joined_by_the_same_key_alone_in_whichever_header(self, backend: FakeBackend) -> None:
        async with in_memory(create_app(Config(api_key=("one", "two")), backend)) as client:
            for headers in ({"api-key": "one"}, {"api-key": "two"}, bearer("one"), {"Authorization": "bearer   two"}):
                response = await client.post(
                    "/v1/images/generations", json={"prompt": "a fox"}, headers=headers | {"Idempotency-Key": "k"}
                )
                assert response.status_code == 200
        assert len(backend.generations) == 2


class TestSecrecy:
    async def test_the_log_says_whose_key_it_was_and_never_the_key(
        self, backend: FakeBackend, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        caplog.set_level(logging.DEBUG)
        file = tmp_path / "keys"
        write(file, FILE.encode())
        async with in_memory(create_app(Config(api_key_file=file), backend)) as client:
            await client.get(URL, headers=bearer("sk-alice-2026") | {"x-request-id": "mine"})
            await client.get(URL, headers=bearer("sk-alice-2027"))
            exposition = (await client.get("/metrics", headers=bearer("sk-alice-2026"))).text
            description = (await client.get("/openapi.json")).text + (await client.get("/docs")).text
        (first, second, *_) = [record for record in caplog.records if record.name == "hypergen_gateway.access"]
        assert first.getMessage().endswith(" mine alice")
        assert '"key": "alice"' in JsonLines().format(first)
        assert '"key"' not in JsonLines().format(second)
        for text in (caplog.text, exposition, description):
            assert "sk-" not in text

    def test_what_is_kept_says_nothing_either(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(FILE)
        for keys in (Keys(["hunter2"]), Keys(file=file)):
            kept = pickle.dumps(keys) + repr(vars(keys)).encode()
            assert b"hunter2" not in kept
            assert b"sk-" not in kept

    def test_triton_and_its_models_do_not_inherit_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hypergen_gateway.embedded.installation import find_installation
        from hypergen_gateway.embedded.run_folder import RunFolder
        from hypergen_gateway.embedded.server import Launch, free_ports

        for name in ("HYPERGEN_API_KEY", "HYPERGEN_LINK_SECRET"):
            monkeypatch.setenv(name, "hunter2")
        launch = Launch(find_installation(), Path(os.devnull), free_ports())
        folder = RunFolder.make(launch.installation, launch.model_repository)
        try:
            assert "hunter2" not in launch.environment(folder).values()
            assert not any("hunter2" in word for word in launch.command(folder))
        finally:
            folder.remove()
