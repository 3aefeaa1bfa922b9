"""Content hashes of checkpoint files. The hash of a large file is reused until the file's inode changes.

Name, size and modification time do not identify content: archives, Nix and buildpacks give all files the same time,
and two fine-tunes of one architecture have the same size. The inode's change time is set by the kernel.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# Smaller files are read in less than a tenth of a second, so their hashes are not stored.
LARGE = 64 * 2**20
_READ_BYTES = 2**20
# A file that changes within the clock's granularity after it was read keeps its times: two seconds at the coarsest.
_SETTLED_NS = 2 * 10**9
# A change time that is a multiple of this was not set by the kernel: squashfs and the like report the archive's.
_ROUNDED_NS = 10**6


class ContentHashes:
    """SHA-256 of files. `known` is `stored` of an earlier instance; `stat` is replaceable for tests."""

    def __init__(
        self, known: Mapping[str, str] | None = None, stat: Callable[[Path], os.stat_result] = os.stat
    ) -> None:
        self._known = dict(known or {})
        self._stat = stat
        self._read: dict[Path, str] = {}
        self.stored: dict[str, str] = {}
        """Hashes of large files, by inode, size and times."""

    def __call__(self, path: Path) -> str:
        """The file's hash. Raises OSError."""
        if path not in self._read:
            self._read[path] = self._lookup(path) or self._hash(path, lambda _: None)
        return self._read[path]

    def read(self, paths: Iterable[Path], report: Callable[[float], None]) -> None:
        """Hash the files, reporting the fraction done. Raises OSError."""
        paths = list(paths)
        total, done = sum(self._stat(path).st_size for path in paths), 0

        def count(chunk: int) -> None:
            nonlocal done
            done += chunk
            report(done / total)

        for path in paths:
            self._read[path] = self._hash(path, count)

    def unknown(self, paths: Iterable[Path]) -> list[Path]:
        """The large files that must be read to be hashed."""
        return [path for path in dict.fromkeys(paths) if self._is_unknown(path)]

    @property
    def has_new_hashes(self) -> bool:
        """Whether `stored` has hashes that were not known before."""
        return not self.stored.items() <= self._known.items()

    def _is_unknown(self, path: Path) -> bool:
        return self._stat(path).st_size >= LARGE and not self._lookup(path)

    def _lookup(self, path: Path) -> str | None:
        stamp = _stamp(self._stat(path))
        known = self._known.get(stamp)
        if known:
            self.stored[stamp] = known
        return known

    def _hash(self, path: Path, count: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        before = self._stat(path)
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
                count(len(chunk))
        after = self._stat(path)
        if after.st_size >= LARGE and _stamp(before) == _stamp(after) and _is_reliable(after.st_ctime_ns):
            self.stored[_stamp(after)] = digest.hexdigest()
        return digest.hexdigest()


def _stamp(status: os.stat_result) -> str:
    """A string that changes whenever the content does. Without the device number, which changes with every mount."""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _is_reliable(ctime_ns: int) -> bool:
    return ctime_ns % _ROUNDED_NS != 0 and time.time_ns() - ctime_ns > _SETTLED_NS
