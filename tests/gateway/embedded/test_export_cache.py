"""How the exporter is started: alone for an export, for no longer than the gateway, with no module of where it is."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository

SERVE = """
import asyncio, sys
from pathlib import Path
from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository
options = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=Path(sys.argv[2]))
asyncio.run(find_repository(sys.argv[1], options))
"""


@pytest.fixture
def options(cache_dir: Path) -> ExportOptions:
    return ExportOptions(dtype="float32", max_batch_size=8, cache_dir=cache_dir)


@pytest.fixture
def own_cache(exported: Path, tmp_path: Path) -> ExportOptions:
    """A cache with this one export, which may be broken."""
    shutil.copytree(exported, tmp_path / "cache" / exported.name)
    return ExportOptions(dtype="float32", max_batch_size=8, cache_dir=tmp_path / "cache")


def find(model: Path, options: ExportOptions) -> Path:
    return asyncio.run(find_repository(str(model), options))


def test_it_runs_no_module_of_the_current_folder(
    checkpoint: Path, exported: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the checkpoint, where somebody says `hypergen serve .`; and a search path may have an empty entry."""
    trapped = tmp_path / "trapped"
    folder = tmp_path / "folder"
    folder.mkdir()
    for module in ("json", "runpy", "click", "site", "sitecustomize", "encodings", "hypergen_export"):
        (folder / f"{module}.py").write_text(f"open({str(trapped)!r}, 'w').close()")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f":.:{os.environ.get('PYTHONPATH', '')}:")
    assert find(checkpoint, options) == exported
    assert not trapped.exists()


def test_a_second_one_waits_for_the_first_and_takes_its_export(
    checkpoint: Path, exported: Path, options: ExportOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hypergen_gateway.console")
    logging.getLogger("hypergen_gateway.console").propagate = True
    lock = os.open(exported.with_name(f".{exported.name}.lock"), os.O_RDONLY | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    async def wait() -> Path:
        second = asyncio.create_task(find_repository(str(checkpoint), options))
        while "waiting for it" not in caplog.text:
            assert not second.done()
            await asyncio.sleep(0.05)
        assert not [each for each in psutil.Process().children() if "hypergen_export" in " ".join(each.cmdline())]
        os.close(lock)
        return await second

    assert asyncio.run(wait()) == exported
    assert str(exported) in caplog.text


@pytest.fixture
def first_start(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A gateway that exports, and its exporter."""
    with subprocess.Popen([sys.executable, "-c", SERVE, str(checkpoint), str(tmp_path / "cache")]) as gateway:
        ends = time.monotonic() + 60
        while not (exporters := psutil.Process(gateway.pid).children()):
            assert time.monotonic() < ends
            time.sleep(0.01)
        yield gateway, exporters[0]
        gateway.kill()


def test_it_ends_with_the_gateway_and_is_alone_until_then(
    first_start: tuple[subprocess.Popen[bytes], psutil.Process],
) -> None:
    gateway, exporter = first_start
    while "hypergen_export" not in " ".join(exporter.cmdline()):  # it is not one yet
        time.sleep(0.01)
    held = [entry.resolve().name for entry in Path(f"/proc/{exporter.pid}/fd").iterdir()]
    assert [name for name in held if name.endswith(".lock")]
    gateway.kill()
    gateway.wait()
    assert not psutil.wait_procs([exporter], timeout=30)[1]


@pytest.mark.parametrize("record", ["{", "{}", "[]", None])
def test_a_damaged_export_in_the_cache_is_made_again(
    checkpoint: Path, exported: Path, own_cache: ExportOptions, record: str | None
) -> None:
    # Its components are taken from the one beside it.
    shutil.copytree(exported, own_cache.cache_dir / "beside")
    file = own_cache.cache_dir / exported.name / "hypergen.json"
    file.unlink() if record is None else file.write_text(record)
    repository = find(checkpoint, own_cache)
    assert repository == own_cache.cache_dir / exported.name
    assert file.read_text() == (exported / "hypergen.json").read_text()


def test_an_export_in_a_cache_that_cannot_be_written_is_used(
    checkpoint: Path, own_cache: ExportOptions, tmp_path: Path
) -> None:
    """As a volume that is mounted read-only is."""
    cache = tmp_path / "cache"
    mounting = subprocess.run(["mount", "--bind", "-o", "ro", str(cache), str(cache)], capture_output=True)
    if mounting.returncode:
        pytest.skip(mounting.stderr.decode())
    try:
        with pytest.raises(OSError, match="Read-only"):
            (cache / "file").touch()
        assert find(checkpoint, own_cache).parent == cache
        assert not list(cache.glob(".*"))
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)
