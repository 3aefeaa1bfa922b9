"""A folder of LoRAs whose files come and go: which of them are served, and why others are not.

The exporter's part runs in this process. Engines are stood in for by what they follow the rank pool with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
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

    def add(self, name: str, rank: int = 2) -> Path:
        file = self.folder / f"{name}.safetensors"
        new = file.with_suffix(".new")
        save_file({"unet.one.lora_A.weight": torch.ones(rank, 4), "unet.one.lora_B.weight": torch.ones(4, rank)}, new)
        return new.replace(file)

    @property
    def names(self) -> set[str]:
        return {lora.name for lora in self.backend.loras or ()}

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
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    repository, folder = tmp_path / "repository", tmp_path / "loras"
    weights = PoolWeights(repository / "unet" / "1")
    for made in (folder, repository / "diffusion", weights.folder):
        made.mkdir(parents=True)
    (repository / "diffusion" / "config.pbtxt").write_text('parameters { key: "loras" value { string_value: "[]" } }')
    weights.create("unet", Unet(), LoraPool(rank=8, kernels=False), torch.float32)
    weights.fill([])

    async def change(_: LoraFolder, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return change_columns(repository, request)

    monkeypatch.setattr(LoraFolder, "_change_columns", change)
    engine = following.WeightsFollower(weights.file, following.version(weights.file), lambda: None)
    backend = TritonBackend("127.0.0.1:1")
    task = asyncio.create_task(LoraFolder(folder, repository, backend).follow())
    yield Served(folder, backend)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    engine.close()


async def test_a_lora_that_found_no_room_is_served_once_there_is_some(served: Served) -> None:
    first = served.add("first", rank=6)
    await served.until(lambda: served.names == {"first"})
    served.add("second", rank=4)
    await served.until(lambda: "second" in served.backend.rejected_loras)
    assert "too few are free" in served.backend.rejected_loras["second"]
    first.unlink()
    await served.until(lambda: served.names == {"second"})
    assert served.backend.rejected_loras == {}


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
