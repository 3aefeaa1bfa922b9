"""Write a repository atomically.

It is built in a hidden folder beside its destination and renamed into place. Existing content at the destination is
replaced only if a previous export wrote it, which its record `hypergen.json` shows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypergen_export.errors import NoSpaceError, OutputRefusedError

RECORD = "hypergen.json"
FORMAT = "hypergen triton repository"
# Reserve for configurations, tokenizers and the sampler, and for the file system's metadata.
_SPARE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class PreviousExport:
    """A finished export."""

    folder: Path
    record: Mapping[str, Any]

    def component(self, name: str) -> Mapping[str, Any]:
        """The record of a component; empty if there is none of that name."""
        recorded: Mapping[str, Any] = self.record.get("components", {}).get(name, {})
        return recorded

    @property
    def hashes(self) -> Mapping[str, str]:
        """Stored hashes of large checkpoint files; see `ContentHashes.stored`."""
        known = self.record.get("hashes")
        return known if isinstance(known, dict) else {}

    def is_intact(self, prefix: str) -> bool:
        """Whether all files recorded under `prefix` exist with their recorded sizes."""
        recorded = self.record.get("files", {}).items()
        files = {name: size for name, size in recorded if name.startswith(prefix)}
        return bool(files) and files.items() <= file_sizes(self.folder).items()


def sibling_exports(output: Path) -> Iterator[PreviousExport]:
    """The finished exports beside `output`."""
    with contextlib.suppress(OSError):
        for folder in sorted(output.parent.iterdir()):
            record = None if folder.name.startswith(".") or folder == output else _read(folder)
            if record is not None:
                yield PreviousExport(folder, record)


def read_record(output: Path) -> Mapping[str, Any] | None:
    """The record of the export at `output`; None if there is nothing.

    Raises:
        OutputRefusedError: `output` holds something that no export wrote.
    """
    with _disk_errors(output):
        if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
            return None
    record = _read(output)
    if record is None:
        raise OutputRefusedError(f"{output}: exists and is not an export; choose another --output or remove it")
    return record


def _read(folder: Path) -> Mapping[str, Any] | None:
    """The record in `folder`; None if no export wrote one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def check_space(output: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk. Raises NoSpaceError."""
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    with _disk_errors(output):
        total, _, free = shutil.disk_usage(existing)
    if total and free < needed + _SPARE_BYTES:  # a file system without a total does not report free space
        raise NoSpaceError(
            f"{output}: the repository needs {_megabytes(needed + _SPARE_BYTES)}, but {_megabytes(free)} are free"
        )


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a folder that becomes `output` if the block succeeds and is removed if it does not.

    Raises:
        OutputRefusedError, NoSpaceError: also for OSErrors in the block, which writes to the folder.
    """
    with _disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        lock = _lock(staging)
        try:
            staging.chmod(0o755)  # mkdtemp makes it 0700, but Triton may run as another user
            yield staging
            _move_into_place(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write hypergen.json."""
    text = json.dumps({"format": FORMAT, **record}, indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def update_record(output: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of a finished export. Errors are ignored, since the change only saves time later."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=f".{RECORD}.", dir=output) as folder:
        write_record(Path(folder), record)
        (Path(folder) / RECORD).replace(output / RECORD)


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> size in bytes of every file under `folder` except the record."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _move_into_place(staging: Path, output: Path) -> None:
    """Rename `staging` to `output`; a previous export there is kept until the new one is in place."""
    if not output.exists() or not any(output.iterdir()):
        staging.rename(output)
        return
    previous = staging.with_name(staging.name + ".previous")
    try:
        output.rename(previous)
        staging.rename(output)
    except BaseException:
        if previous.exists() and not output.exists():
            previous.rename(output)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    """Delete staging folders of killed exports of `output`; a running export holds a lock on its own."""
    for folder in output.parent.glob(f".{output.name}.*.partial*"):
        with contextlib.suppress(OSError):
            os.close(_lock(folder))
            shutil.rmtree(folder)


def _lock(folder: Path) -> int:
    """Lock `folder` until the descriptor is closed. Raises OSError if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Turn OSErrors into OutputRefusedError or NoSpaceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"{output}: the disk is full") from error
        reason = error.strerror or str(error)
        raise OutputRefusedError(f"{output}: cannot be written ({reason})") from error


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB"
