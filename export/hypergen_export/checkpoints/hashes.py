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
        self._large: dict[Path, tuple[os.stat_result, str]] = {}
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

    def renew(self) -> bool:
        """Store the hashes of large files whose change time alone has changed, by a hard link; returns whether any has.

        Waits until each file would get another change time if it changed now: two seconds after the link.
        """
        renewed = False
        for path, (before, digest) in self._large.items():
            after = self._stat(path)
            if _stamp(after) != _stamp(before) and _content_stamp(after) == _content_stamp(before):
                age = time.time_ns() - after.st_ctime_ns
                time.sleep(max(0, min(_SETTLED_NS, _SETTLED_NS - age)) / 10**9)
                renewed |= self._store(path, after, digest)
        return renewed

    @property
    def has_new_hashes(self) -> bool:
        """Whether `stored` has hashes that were not known before."""
        return not self.stored.items() <= self._known.items()

    def _is_unknown(self, path: Path) -> bool:
        return self._stat(path).st_size >= LARGE and not self._lookup(path)

    def _lookup(self, path: Path) -> str | None:
        status = self._stat(path)
        known = self._known.get(_stamp(status))
        if known:
            self.stored[_stamp(status)] = known
            self._large[path] = status, known
        return known

    def _hash(self, path: Path, count: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        before = self._stat(path)
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
                count(len(chunk))
        if before.st_size >= LARGE:
            self._store(path, before, digest.hexdigest())
        return digest.hexdigest()

    def _store(self, path: Path, before: os.stat_result, digest: str) -> bool:
        """Store the hash of a large file that has not changed since `before`; returns whether it can be relied on."""
        if _stamp(self._stat(path)) != _stamp(before):
            return False
        self._large[path] = before, digest
        if _is_reliable(before.st_ctime_ns):
            self.stored[_stamp(before)] = digest
        return _is_reliable(before.st_ctime_ns)


def _stamp(status: os.stat_result) -> str:
    """A string that changes whenever the content does. Without the device number, which changes with every mount."""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _content_stamp(status: os.stat_result) -> tuple[int, ...]:
    """What a hard link leaves as it is."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_reliable(ctime_ns: int) -> bool:
    return ctime_ns % _ROUNDED_NS != 0 and time.time_ns() - ctime_ns > _SETTLED_NS
