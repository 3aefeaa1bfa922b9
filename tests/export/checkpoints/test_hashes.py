"""What is read of a checkpoint's files to tell them apart, and what an earlier export saves of that."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hypergen_export.checkpoints.hashes import LARGE, ContentHashes

WRITTEN_NS = 1_700_000_000_123_456_789


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file as large as those that are remembered, without its bytes on the disk."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def changed_at(ctime_ns: int) -> Callable[[Path], Any]:
    """A file system in which all files were last changed then, which no program can set."""

    def stat(path: Path) -> Any:
        real = path.stat()
        names = ("st_ino", "st_size", "st_mtime_ns")
        return SimpleNamespace(**{name: getattr(real, name) for name in names}, st_ctime_ns=ctime_ns)

    return stat


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    for path, content in ((one, b"abc"), (same, b"abc"), (other, b"abd")):
        path.write_bytes(content)
        os.utime(path, (1, 1))
    hashed = ContentHashes()
    assert hashed(one) == hashed(same) == digest(one)
    assert hashed(other) == digest(other)
    assert not hashed.stored, "small files are read each time"


def test_a_large_file_is_read_once_for_all_exports(large: Path) -> None:
    first = ContentHashes(stat=changed_at(WRITTEN_NS))
    assert first.unknown([large, large]) == [large]
    shares: list[float] = []
    first.read([large], shares.append)
    assert first(large) == digest(large)
    assert shares == sorted(shares)
    assert (len(shares), shares[-1]) == (64, 1.0)
    assert first.has_new_hashes
    second = ContentHashes(first.stored, changed_at(WRITTEN_NS))
    assert second.unknown([large]) == []
    assert second(large) == digest(large)
    assert (second.stored, second.has_new_hashes) == (first.stored, False)


def test_a_file_whose_times_were_set_back_is_read_again(large: Path) -> None:
    """As by cp -p, tar and rsync: what cannot be set is the time of the inode's own change."""
    os.utime(large, (1, 1))
    first = ContentHashes(stat=changed_at(WRITTEN_NS))
    before = first(large)
    with large.open("r+b") as file:
        file.write(b"other weights")
    os.utime(large, (1, 1))
    second = ContentHashes(first.stored, changed_at(WRITTEN_NS + 5))
    assert second.unknown([large]) == [large]
    assert second(large) == digest(large) != before


@pytest.mark.parametrize(
    ("ctime_ns", "why"),
    [
        (1_000_000_000, "squashfs and the like give an archive's time, which other weights may have, too"),
        (1_700_000_000_250_000_000, "a clock that stands still for so long may hide a change"),
        (2**62 + 1, "it may still be written to"),
    ],
)
def test_the_hash_of_a_file_with_an_unreliable_change_time_is_not_stored(large: Path, ctime_ns: int, why: str) -> None:
    hashed = ContentHashes(stat=changed_at(ctime_ns))
    assert hashed(large) == digest(large)
    assert not hashed.stored, why


def test_a_hard_link_changes_a_files_times_but_costs_no_second_reading(large: Path) -> None:
    times = [WRITTEN_NS]
    first = ContentHashes(stat=lambda path: changed_at(times[0])(path))
    assert not first.renew(), "nothing is known yet"
    first(large)
    assert not first.renew(), "nothing has changed"
    times[0] += 5_000_001
    assert first.renew()
    assert ContentHashes(first.stored, changed_at(times[0])).unknown([large]) == []
    with large.open("r+b") as file:
        file.write(b"other weights")
    os.utime(large, (1, 1))
    times[0] += 5_000_001
    assert not first.renew(), "another time of modification: other weights"
    assert ContentHashes(first.stored, changed_at(times[0])).unknown([large]) == [large]
