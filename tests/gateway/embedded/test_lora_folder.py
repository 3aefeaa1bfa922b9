"""A folder of LoRAs whose files come and go: which of them are served, and why others are not.

The exporter's part runs in this process. Engines are stood in for by what they follow the rank pool with.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.repository.lora_columns import change_columns
from hypergen_gateway.embedded import lora_folder
from hypergen_gateway.embedded.backends.openvino import following
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.lora_folder import LoraFolder, served_copy
from hypergen_gateway.errors import InvalidRequestError, UnavailableError
from hypergen_gateway.triton.client import TritonBackend

SECONDS = 20.0


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)


@dataclass(frozen=True)
class Served:
    folder: Path
    backend: TritonBackend
    table: Path
    """What the sampler reads."""
    failure: Path
    """While it exists, the engine cannot read the pool."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def add(self, name: str, rank: int = 2) -> Path:
        file = self.folder / f"{name}.safetensors"
        new = file.with_suffix(".new")
        save_file({"unet.one.lora_A.weight": torch.ones(rank, 4), "unet.one.lora_B.weight": torch.ones(4, rank)}, new)
        return new.replace(file)

    @property
    def names(self) -> set[str]:
        return {lora.name for lora in self.backend.loras or ()}

    @property
    def columns(self) -> dict[str, list[int]]:
        """Of the LoRAs in the pool."""
        entries = json.loads(self.table.read_text()) if self.table.exists() else []
        return {entry["name"]: entry["columns"] for entry in entries}

    def hold(self, *names: str) -> AbstractAsyncContextManager[None]:
        """As a running request does."""
        return self.backend.hold_loras(names)

    async def started(self, *names: str) -> asyncio.Event:
        """A request that has begun, until the event is set."""
        begun, end = asyncio.Event(), asyncio.Event()

        async def run() -> None:
            async with self.hold(*names):
                begun.set()
                await end.wait()

        self.tasks.append(asyncio.create_task(run()))
        await asyncio.wait_for(begun.wait(), SECONDS)
        return end

    async def until(self, is_so: Callable[[], bool]) -> None:
        async def look() -> None:
            while not is_so():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(look(), SECONDS)


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A folder that is followed, with room for eight columns."""
    monkeypatch.setattr(lora_folder, "SCAN_SECONDS", 0.02)
    monkeypatch.setattr(lora_folder, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(lora_folder, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(following, "RETRY_SECONDS", 0.05)
    repository, folder = tmp_path / "repository", tmp_path / "loras"
    weights = PoolWeights(repository / "unet" / "1")
    for made in (folder, repository / "diffusion", weights.folder):
        made.mkdir(parents=True)
    parameters = {"loras": "[]", "lora_rank": "8"}
    lines = [f'parameters {{ key: "{name}" value {{ string_value: "{text}" }} }}' for name, text in parameters.items()]
    (repository / "diffusion" / "config.pbtxt").write_text("\n".join(lines))
    weights.create("unet", Unet(), LoraPool(rank=8, kernels=False), torch.float32)
    weights.fill([])

    async def change(_: LoraFolder, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return change_columns(repository, request)

    def read_again() -> None:
        if (tmp_path / "engine fails").exists():
            raise MemoryError

    monkeypatch.setattr(LoraFolder, "_change_columns", change)
    engine = following.WeightsFollower(weights.file, following.version(weights.file), read_again)
    backend = TritonBackend("127.0.0.1:1")
    task = asyncio.create_task(LoraFolder(folder, repository, backend).follow())
    yield Served(folder, backend, repository / "diffusion" / "loras.json", tmp_path / "engine fails")
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    engine.close()


async def test_the_least_recently_used_lora_gives_way_to_one_that_a_request_names(served: Served) -> None:
    for name in "abc":
        served.add(name, rank=3)
    await served.until(lambda: served.names == {*"abc"})
    assert served.columns.keys() == {*"ab"}
    assert [lora.in_pool for lora in served.backend.loras or ()] == [True, True, False]
    async with served.hold("a"):
        pass
    async with served.hold("c"):
        assert served.columns.keys() == {*"ac"}
    async with served.hold("b", "a"):
        assert served.columns.keys() == {*"ab"}


async def test_a_lora_in_use_stays_in_the_pool(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        served.add(name, rank=4)
    await served.until(lambda: served.names == {*"abc"})
    ends = [await served.started(name) for name in "ab"]
    monkeypatch.setattr(lora_folder, "REQUEST_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match="no room for 'c' in time"):
        async with served.hold("c"):
            pass
    monkeypatch.setattr(lora_folder, "REQUEST_SECONDS", SECONDS)
    waiting = asyncio.create_task(served.started("c"))
    await asyncio.sleep(0.1)
    assert served.columns.keys() == {*"ab"}
    ends[1].set()
    (await waiting).set()
    assert served.columns.keys() == {*"ac"}
    ends[0].set()


async def test_a_lora_in_use_all_the_time_gives_way_in_turn(served: Served) -> None:
    for name, rank in {"a": 4, "b": 4, "c": 8}.items():
        served.add(name, rank=rank)
    await served.until(lambda: served.names == {*"abc"})
    begun: list[str] = []

    async def use(name: str, after: float) -> None:
        await asyncio.sleep(after)
        while True:
            async with served.hold(name):
                begun.append(name)
                await asyncio.sleep(0.05)

    served.tasks.extend(asyncio.create_task(use(name, after)) for name in "ab" for after in (0.0, 0.025))
    await served.until(lambda: len(begun) > 8)
    end = await served.started("c")
    begun.clear()
    assert served.columns.keys() == {"c"}
    end.set()
    await served.until(lambda: len(begun) > 8)
    assert served.columns.keys() == {*"ab"}
    for task in served.tasks:
        task.cancel()


async def test_requests_that_need_more_columns_than_there_are_are_refused(served: Served) -> None:
    served.add("large", rank=9)
    for name in "ab":
        served.add(name, rank=5)
    await served.until(lambda: served.names == {*"ab"})
    why = served.backend.rejected_loras["large"]
    assert why == "large.safetensors: needs 9 columns of the rank pool, which has 8 for files"
    with pytest.raises(InvalidRequestError, match="'a', 'b' have a rank of 10 together, and the rank pool has 8 col"):
        async with served.hold("a", "b"):
            pass


async def test_a_file_replaced_under_steady_use_does_not_keep_its_former_columns(served: Served) -> None:
    served.add("a", rank=2)
    await served.until(lambda: served.columns == {"a": [0, 1]})
    former = await served.started("a")
    served.add("a", rank=3)
    await served.until(lambda: served.columns["a"] == [2, 3, 4])  # always there
    later = await served.started("a")
    former.set()
    served.add("b", rank=5)
    await served.until(lambda: "b" in served.names)
    async with served.hold("b"):
        assert served.columns == {"a": [2, 3, 4], "b": [0, 1, 5, 6, 7]}
    later.set()


async def test_a_file_of_the_same_size_and_time_is_read_again(served: Served) -> None:
    file = served.add("a", rank=2)
    await served.until(lambda: served.columns == {"a": [0, 1]})
    before = file.stat()
    served.add("a", rank=2)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    await served.until(lambda: served.columns == {"a": [2, 3]})


async def test_a_file_is_read_again_once_it_may_be(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(_: Path) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as denying:  # as the root user is denied nothing
        denying.setattr("hypergen_export.checkpoints.lora.safetensors_header", deny)
        file = served.add("a")
        why = "a.safetensors: cannot be read (Permission denied)"
        await served.until(lambda: served.backend.rejected_loras == {"a": why})
    file.chmod(0o644)
    await served.until(lambda: served.columns == {"a": [0, 1]})
    assert served.backend.rejected_loras == {}


async def test_an_engine_that_cannot_read_the_pool_keeps_nothing_else_from_being_served(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_folder, "ENGINES_SECONDS", 0.1)
    served.failure.touch()
    served.add("a")
    await served.until(lambda: "a" in served.backend.rejected_loras)
    assert served.backend.rejected_loras["a"] == "it cannot be loaded now, as the log says; trying again"
    assert served.columns == {}
    served.failure.unlink()
    await served.until(lambda: served.columns == {"a": [0, 1]})
    assert served.backend.rejected_loras == {}


async def test_a_file_that_ends_the_exporter_keeps_nothing_else_from_being_served(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    change: Any = LoraFolder._change_columns

    async def die_of_bad(follower: LoraFolder, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        if "bad" in [entry["name"] for entry in request["add"]]:
            raise RuntimeError("the exporter failed")  # as by the kernel, for lack of memory
        answers: list[dict[str, Any]] = await change(follower, request)
        return answers

    monkeypatch.setattr(LoraFolder, "_change_columns", die_of_bad)
    for name in ("bad", *"abc"):
        served.add(name, rank=4)
    await served.until(lambda: served.names == {*"abc"})
    assert served.backend.rejected_loras.keys() == {"bad"}
    (outside,) = {*"abc"} - served.columns.keys()
    async with served.hold(outside):
        assert outside in served.columns


@pytest.mark.parametrize("error", [KeyError("name"), AttributeError("x")], ids=repr)
async def test_the_folder_is_followed_on_whatever_goes_wrong(
    error: Exception, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: LoraFolder) -> dict[str, Any]:
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(LoraFolder, "_scan", fail)
        await asyncio.sleep(0.1)
    served.add("a")
    await served.until(lambda: served.columns == {"a": [0, 1]})


async def test_a_file_that_cannot_have_a_name_is_listed_with_the_reason(served: Served) -> None:
    served.add("ink 1")
    served.add("ink-1")
    served.add("\u58a8\u6c34")
    os.mkfifo(served.folder / "pipe.safetensors")
    (served.folder / "folder.safetensors").mkdir()
    await served.until(lambda: served.names == {"ink-1"} and len(served.backend.rejected_loras) == 4)
    assert served.backend.rejected_loras == {
        "ink-1.safetensors": "its name in requests would be ink-1, which ink 1.safetensors has",
        "\u58a8\u6c34.safetensors": "its name must have a letter from a to z or a digit",
        "pipe.safetensors": "it is not a file",
        "folder.safetensors": "it is not a file",
    }


def test_a_repository_that_is_the_current_folder_is_copied_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    (repository / "diffusion").mkdir(parents=True)
    monkeypatch.chdir(repository)
    with served_copy(Path()) as copy:
        assert copy.resolve().parent == tmp_path
        assert [path.name for path in repository.iterdir()] == ["diffusion"]


def test_a_repository_on_a_read_only_volume_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with (
        pytest.raises(
            EmbeddedError, match=rf"--lora-dir serves a copy .* {tmp_path} cannot be written to \(Permission"
        ),
        served_copy(tmp_path / "repository"),
    ):
        pass
