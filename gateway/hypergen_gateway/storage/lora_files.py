"""The files of `--lora-dir`: the names that requests use for them, and those that clients add and remove."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Names that clients may give. They begin and end such that no file name means another one.
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")
SUFFIX = ".safetensors"
# Of files that are being written.
_UPLOAD = ".upload-"
_BEGINNING_SECONDS = 10.0
# The largest header that the format allows.
_MAX_HEADER_BYTES = 100_000_000


def requested_name(file: Path) -> str:
    """The name by which requests select a file; empty if no character of its name may be in one."""
    return _OTHER_CHARACTERS.sub("-", file.stem).strip("-")[:64]


def is_safetensors(file: BinaryIO, size: int) -> bool:
    """Whether a file is one of safetensors as a whole: a JSON object after its length, and all weights that it states.

    Half of a file must not replace a whole one.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        return False
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(max(ends, default=0) <= size - 8 - length)
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return False


def _try_lock(descriptor: int) -> bool:
    """Lock a file until it is closed; False if another process has, or if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class LoraFiles:
    """The folder. All methods block; they raise OSError."""

    folder: Path

    def save(self, name: str, file: BinaryIO) -> None:
        """Write a file that is there as a whole or not at all. It replaces the one of that name."""
        target = self._find(name) or self.folder / f"{name}{SUFFIX}"
        descriptor, path = tempfile.mkstemp(prefix=_UPLOAD, dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as new:
                _try_lock(descriptor)
                file.seek(0)
                shutil.copyfileobj(file, new, 1 << 20)
                new.flush()
                os.fsync(new.fileno())
                # While it is locked: a long time may have passed since its last byte.
                Path(path).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(path).unlink()
            raise

    def remove(self, name: str) -> bool:
        """Remove the file of a name; whether there was one."""
        found = self._find(name)
        if found is not None:
            found.unlink(missing_ok=True)
        return found is not None

    def remove_abandoned(self) -> None:
        """Remove what uploads have left whose process was killed: no process holds their locks any more."""
        for file in filter(Path.is_file, self.folder.glob(f"{_UPLOAD}*")):  # to open a pipe would wait for its writer
            # For writing, which NFS requires for an exclusive lock.
            with contextlib.suppress(OSError), file.open("r+b") as left:
                # One that has just begun may not be locked yet.
                has_begun = time.time() - os.fstat(left.fileno()).st_mtime > _BEGINNING_SECONDS
                if has_begun and _try_lock(left.fileno()):
                    file.unlink()

    def _find(self, name: str) -> Path | None:
        """The file that requests name so, or that is listed under its whole name as it cannot be served."""
        files = sorted(file for file in self.folder.glob(f"*{SUFFIX}") if file.is_file())
        served = next((file for file in files if requested_name(file) == name), None)
        return served or next((file for file in files if file.name == name), None)
