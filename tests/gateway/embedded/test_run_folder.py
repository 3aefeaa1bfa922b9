"""The folder that a server runs on, and what is done about those of killed gateways."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypergen_gateway.embedded.environment import import_path
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.run_folder import RunFolder, remove_abandoned, temporary_folder

NOBODY = 65534
# A gateway that is killed, or that lives until it is told to end: it says where its folder is.
GATEWAY = """
import sys, tempfile
from pathlib import Path
from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.run_folder import RunFolder
tempfile.tempdir = sys.argv[1]
folder = RunFolder.make(find_installation(), Path("/"))
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own: tests in other processes start servers, too."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@contextlib.contextmanager
def another_gateway(place: Path, *prefix: str) -> Iterator[Path]:
    """The folder of a gateway that lives while this lasts and is killed then."""
    command = [*prefix, sys.executable, "-c", GATEWAY, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            folder = process.stdout.readline().strip()
            # Path("") is the current folder, and what is yielded here is changed and removed.
            assert folder, "the gateway made no folder"
            yield Path(folder)
        finally:
            process.kill()


@pytest.fixture
def folder() -> Iterator[RunFolder]:
    made = RunFolder.make(find_installation(), Path("models"))
    yield made
    made.remove()


def test_it_holds_the_python_backend_with_its_stub_and_our_openvino_backend(folder: RunFolder) -> None:
    assert os.access(folder.backends / "python" / "triton_python_backend_stub", os.X_OK)
    library = folder.backends / "python" / "libtriton_python.so"
    assert library.is_file()
    assert not library.is_symlink(), "Triton refuses a library outside its backend's folder"
    assert (folder.backends / "openvino" / "model.py").is_file()


def test_its_repository_is_an_absolute_link(folder: RunFolder) -> None:
    assert folder.models.readlink() == Path.cwd() / "models"
    assert folder.restore_paths(f"{folder.models}/unet: broken") == f"{Path.cwd()}/models/unet: broken"


def test_its_python_finds_what_this_one_does(folder: RunFolder) -> None:
    """As the stub starts it: by the name `python3`, with no variable to tell it more."""
    code = "import sys, numpy, hypergen_gateway; print(sys.version_info[:2], *sys.path, sep='\\n')"
    ended = subprocess.run(
        [folder.programs / "python3", "-I", "-c", code], capture_output=True, text=True, check=True, cwd=folder.path
    )
    version, *path = ended.stdout.splitlines()
    assert version == str(sys.version_info[:2])
    assert {Path(entry).resolve() for entry in path} >= {entry.resolve() for entry in import_path() if entry.exists()}


def test_it_is_gone_with_its_server(place: Path) -> None:
    folder = RunFolder.make(find_installation(), Path("models"))
    region = Path("/dev/shm") / f"{folder.name}-region"
    region.touch()
    for _ in range(2):
        folder.remove()
        assert not list(place.iterdir())
        assert not region.exists()


class TestAbandoned:
    def test_what_a_killed_gateway_left_is_removed_and_a_living_ones_is_kept(self, place: Path) -> None:
        with another_gateway(place) as abandoned:
            region = Path("/dev/shm") / f"{abandoned.name}-region"
            region.touch()
            remove_abandoned()
            assert abandoned.exists()
            assert region.exists()
        remove_abandoned()
        assert not abandoned.exists()
        assert not region.exists()

    def test_so_is_that_of_one_whose_number_another_process_has_now(self, place: Path) -> None:
        """In a container the gateway is process 1 each time."""
        with another_gateway(place) as folder:
            pass
        abandoned = folder.rename(place / f"hypergen-triton-{os.getpid()}-again")
        remove_abandoned()
        assert not abandoned.exists()

    def test_a_gateway_in_another_container_keeps_its_own(self, place: Path) -> None:
        """Its process is not seen from here, and has a number that nobody has here, or another."""
        unshare = ("unshare", "--pid", "--fork", "--kill-child")
        if problem := subprocess.run([*unshare, "true"], capture_output=True).stderr:
            pytest.skip(problem.decode())
        with another_gateway(place, *unshare) as folder:
            assert folder.name.split("-")[2] == "1"
            remove_abandoned()
            assert folder.exists()

    def test_other_users_remains_are_neither_touched_nor_in_the_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.geteuid():
            pytest.skip("only root can make files of another user")
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            place = Path(name)
            place.chmod(0o1777)
            monkeypatch.setattr(tempfile, "tempdir", name)
            with another_gateway(place) as theirs, another_gateway(place) as ours:
                pass
            os.chown(theirs, NOBODY, NOBODY)
            os.seteuid(NOBODY)
            try:
                remove_abandoned()
            finally:
                os.seteuid(0)
            assert ours.exists()
            remove_abandoned()
            assert theirs.exists()
            assert not ours.exists()

    def test_a_link_or_a_file_of_that_name_is_not_followed(self, place: Path, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (place / "hypergen-triton-1-link").symlink_to(tmp_path / "precious")
        (place / "hypergen-triton-1-file").touch()
        remove_abandoned()
        assert (tmp_path / "precious").exists()


class TestTemporaryFolder:
    def test_one_that_cannot_be_used_is_said_with_the_reason_and_the_variable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for options, reason in (("size=64k", "No space left on device"), ("noexec", "programs cannot run there")):
            disk = tmp_path / options
            disk.mkdir()
            mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
            if mounting.returncode:
                pytest.skip(mounting.stderr.decode())
            monkeypatch.setattr(tempfile, "tempdir", str(disk))
            try:
                with pytest.raises(EmbeddedError, match=reason) as raised:
                    RunFolder.make(find_installation(), Path("models"))
                assert not list(disk.iterdir())
            finally:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
            assert str(disk) in str(raised.value)
            assert "TMPDIR" in str(raised.value)

    def test_a_machine_without_one_is_told_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
        with pytest.raises(EmbeddedError, match="TMPDIR"):
            temporary_folder()
