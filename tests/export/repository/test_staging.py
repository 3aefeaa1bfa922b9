from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from hypergen_export.checkpoints.files import link_or_copy
from hypergen_export.errors import NoSpaceError, OutputRefusedError
from hypergen_export.repository.staging import check_space, read_record, staged, write_record


def make_repository(output: Path, content: str) -> None:
    with staged(output) as folder:
        (folder / "model.txt").write_text(content)
        write_record(folder, {"content": content})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_repository_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "repository"
    with staged(output) as folder:
        (folder / "model.txt").write_text("new")
        assert not output.exists()
    assert names(output) == ["model.txt"]
    assert names(output.parent) == ["repository"]
    assert output.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    make_repository(tmp_path / "repository", "old")

    def fail() -> None:
        with staged(tmp_path / "repository") as folder:
            (folder / "model.txt").write_text("new")
            raise failure

    with pytest.raises(failure):
        fail()
    assert names(tmp_path) == ["repository"]
    assert (tmp_path / "repository" / "model.txt").read_text() == "old"


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    make_repository(tmp_path / "repository", "old")
    make_repository(tmp_path / "repository", "new")
    assert names(tmp_path) == ["repository"]
    assert (tmp_path / "repository" / "model.txt").read_text() == "new"
    record = read_record(tmp_path / "repository")
    assert record is not None
    assert record["content"] == "new"


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="the disk is full"), staged(tmp_path / "repository"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_space_is_checked_before_anything_is_done(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet" / "there", 1000)
    with pytest.raises(NoSpaceError, match=r"needs .* MB, but .* MB are free"):
        check_space(tmp_path / "not" / "yet" / "there", 2**60)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputRefusedError, match="cannot be written"), staged(tmp_path / "file" / "repository"):
        raise AssertionError("never reached")


@pytest.mark.parametrize("record", [None, "{}", "no json", '{"format": "something else"}'])
def test_a_folder_that_no_export_wrote_is_rejected(tmp_path: Path, record: str | None) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    if record is not None:
        (precious / "hypergen.json").write_text(record)
    with pytest.raises(OutputRefusedError, match="is not an export"):
        read_record(precious)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputRefusedError):
        read_record(tmp_path / "file")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    output = tmp_path / "empty"
    output.mkdir()
    assert read_record(output) is None
    make_repository(output, "new")
    assert (output / "model.txt").read_text() == "new"


def test_staging_folders_of_killed_exports_are_removed_and_those_of_running_ones_are_kept(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".repository.aaa.partial", tmp_path / ".repository.bbb.partial"
    unrelated = tmp_path / ".other.ccc.partial"
    for folder in (dead, alive, unrelated):
        folder.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        make_repository(tmp_path / "repository", "new")
    finally:
        os.close(descriptor)
    assert not dead.exists()
    assert alive.exists()
    assert unrelated.exists()


def test_a_linked_file_takes_no_further_disk_space(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("weights")
    link_or_copy(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_text() == "weights"
    assert (tmp_path / "one").samefile(tmp_path / "two")
