"""Files by their content: large ones are read once, as long as the file system says that they are untouched.

A name, a size and a modification time say nothing: archives, Nix and buildpacks give all files the same time, and two
fine-tunes of one architecture have the same size. The time of the last change of an inode is the kernel's own.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# Below this, reading a file costs less than a tenth of a second, and nothing is remembered.
LARGE = 64 * 2**20
_READ_BYTES = 2**20
# A file that changes within the clock's granularity after it was read keeps its times: two seconds on the coarsest.
_SETTLED_NS = 2 * 10**9
# Times that are rounded to this are no kernel's clock: those of squashfs and the like are the archive's.
_ROUNDED_NS = 10**6


class ContentHashes:
    """SHA-256 of files. `known` is what an earlier one had in `remembered`; `stat` is what tells a file's times."""

    def __init__(
        self, known: Mapping[str, str] | None = None, stat: Callable[[Path], os.stat_result] = os.stat
    ) -> None:
        self._known = dict(known or {})
        self._stat = stat
        self._read: dict[Path, str] = {}
        self.remembered: dict[str, str] = {}
        """Of large files alone: what the file system says of each -> its hash."""

    def __call__(self, path: Path) -> str:
        """The file's hash. Raises OSError."""
        if path not in self._read:
            self._read[path] = self._recalled(path) or self._hash(path, lambda _: None)
        return self._read[path]

    def read(self, paths: Iterable[Path], report: Callable[[float], None]) -> None:
        """Hash those of the files that are `unknown`, telling `report` the share that is done. Raises OSError."""
        paths = list(paths)
        total, done = sum(self._stat(path).st_size for path in paths), 0

        def count(chunk: int) -> None:
            nonlocal done
            done += chunk
            report(done / total)

        for path in paths:
            self._read[path] = self._hash(path, count)

    def unknown(self, paths: Iterable[Path]) -> list[Path]:
        """The large files whose hash takes reading them."""
        return [path for path in dict.fromkeys(paths) if self._is_unknown(path)]

    @property
    def has_news(self) -> bool:
        """Whether something is remembered that was not known before."""
        return not self.remembered.items() <= self._known.items()

    def _is_unknown(self, path: Path) -> bool:
        return self._stat(path).st_size >= LARGE and not self._recalled(path)

    def _recalled(self, path: Path) -> str | None:
        stamp = _stamp(self._stat(path))
        known = self._known.get(stamp)
        if known:
            self.remembered[stamp] = known
        return known

    def _hash(self, path: Path, count: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        before = self._stat(path)
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
                count(len(chunk))
        after = self._stat(path)
        if after.st_size >= LARGE and _stamp(before) == _stamp(after) and _is_telling(after.st_ctime_ns):
            self.remembered[_stamp(after)] = digest.hexdigest()
        return digest.hexdigest()


def _stamp(status: os.stat_result) -> str:
    """What changes whenever the content does. The device's number is left out: it changes with every mount."""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _is_telling(ctime_ns: int) -> bool:
    return ctime_ns % _ROUNDED_NS != 0 and time.time_ns() - ctime_ns > _SETTLED_NS
