"""How a repository gets onto the disk: whole or not at all.

It is built in a hidden folder beside its destination and renamed into place. What is at the destination is touched
only if an earlier export wrote it, which the record `hypergen.json` shows.
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
# Configurations, tokenizer and sampler, and room for the file system's own books.
_SPARE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class PreviousExport:
    """An export that is already there."""

    folder: Path
    record: Mapping[str, Any]

    def component(self, name: str) -> Mapping[str, Any]:
        """What it recorded of a component; nothing where it has none of that name."""
        recorded: Mapping[str, Any] = self.record.get("components", {}).get(name, {})
        return recorded

    @property
    def hashes(self) -> Mapping[str, str]:
        """Large files of checkpoints by what the file system says of them."""
        known = self.record.get("hashes")
        return known if isinstance(known, dict) else {}

    def is_intact(self, prefix: str) -> bool:
        """Whether the files that it wrote under `prefix` are there in full."""
        recorded = self.record.get("files", {}).items()
        files = {name: size for name, size in recorded if name.startswith(prefix)}
        return bool(files) and files.items() <= file_sizes(self.folder).items()


def exports_beside(output: Path) -> Iterator[PreviousExport]:
    """The finished exports in the folder in which `output` is, or will be."""
    with contextlib.suppress(OSError):
        for folder in sorted(output.parent.iterdir()):
            record = None if folder.name.startswith(".") or folder == output else _read(folder)
            if record is not None:
                yield PreviousExport(folder, record)


def read_record(output: Path) -> Mapping[str, Any] | None:
    """The record of the export at `output`; None where there is nothing yet.

    Raises:
        OutputRefusedError: there is something that no export wrote.
    """
    with _disk_errors(output):
        if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
            return None
    record = _read(output)
    if record is None:
        raise OutputRefusedError(f"{output}: exists and is no exported repository; name another --output or remove it")
    return record


def _read(folder: Path) -> Mapping[str, Any] | None:
    """The record in `folder`; None where no export wrote one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def check_space(output: Path, needed: int) -> None:
    """Refuse an export that the disk cannot hold. Raises NoSpaceError."""
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    with _disk_errors(output):
        total, _, free = shutil.disk_usage(existing)
    if total and free < needed + _SPARE_BYTES:  # a file system without a total does not count
        raise NoSpaceError(
            f"{output}: the repository needs {_megabytes(needed + _SPARE_BYTES)}, {_megabytes(free)} are free"
        )


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` if the block ends well and vanishes if it does not.

    Raises:
        OutputRefusedError, NoSpaceError: also for the OSErrors of the block, since it writes here.
    """
    with _disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        lock = _lock(staging)
        try:
            staging.chmod(0o755)  # mkdtemp's is for its owner alone; Triton may run as another user
            yield staging
            _move_into_place(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write hypergen.json."""
    text = json.dumps({"format": FORMAT, **record}, indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def remember(output: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of a finished export, as far as it may be written: what is added only saves time."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=f".{RECORD}.", dir=output) as folder:
        write_record(Path(folder), record)
        (Path(folder) / RECORD).replace(output / RECORD)


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every file under `folder`, but for the record."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def link_or_copy(source: Path, target: Path) -> None:
    """The same file at another place, without its bytes twice where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _move_into_place(staging: Path, output: Path) -> None:
    """Rename `staging` to `output`; an older export there is kept until the new one stands."""
    if not output.exists() or not any(output.iterdir()):
        staging.rename(output)
        return
    older = staging.with_name(staging.name + ".older")
    try:
        output.rename(older)
        staging.rename(output)
    except BaseException:
        if older.exists() and not output.exists():
            older.rename(output)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    """Delete what killed exports left beside `output`; a living one holds a lock on its folder."""
    for folder in output.parent.glob(f".{output.name}.*.partial*"):
        with contextlib.suppress(OSError):
            os.close(_lock(folder))
            shutil.rmtree(folder)


def _lock(folder: Path) -> int:
    """Lock `folder` until the descriptor is closed. Raises OSError where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """OSErrors of writing as errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"{output}: the disk is full") from error
        reason = error.strerror or str(error)
        raise OutputRefusedError(f"{output}: cannot be written ({reason})") from error


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB"
