"""The files that one run of the server is started on, in a temporary folder that lives as long as it does.

Knows where Triton looks for backends and Python for packages, and what a server leaves behind that could not clean up.

Triton's Python backend writes paths into a shell's command line without quotes, and the interpreter inside it reads no
path but in ASCII. So everything that may lie anywhere, the repository, Triton's libraries, Python and the packages, is
reached by links out of this folder, whose own path is plain.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from hypergen_gateway.embedded.environment import import_path
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import Installation

PREFIX = "hypergen-triton-"
SHARED_MEMORY = Path("/dev/shm")
KILL_SECONDS = 5.0
OWN_BACKENDS = Path(__file__).parent / "backends"
# What a shell leaves as it is, and no list of folders is separated by.
PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+@%=,-]+")
USUAL_PLACES = ("/tmp", "/var/tmp")
# The processes that are started on such a folder, as Linux names them.
PROCESS_NAMES = ("tritonserver", "triton_python_b")

_no_caches = shutil.ignore_patterns("__pycache__")


class RunFolder:
    """A folder that is locked for as long as this object, or its process, lives: see `remove_abandoned`."""

    def __init__(self, path: Path, repository: Path, lock: int) -> None:
        self.path = path
        self.repository = repository
        self._lock = contextlib.ExitStack()
        self._lock.callback(os.close, lock)

    @classmethod
    def make(cls, installation: Installation, repository: Path) -> RunFolder:
        """A new one for a server of `repository`.

        Raises:
            EmbeddedError: the temporary folder cannot be written, or no programs may be run there.
        """
        place = temporary_folder()
        try:
            path, lock = _make_locked(place)
            folder = cls(path, repository.absolute(), lock)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(folder.remove)
                _check_programs_run(path)
                folder._fill(installation)
                on_failure.pop_all()
        except OSError as error:
            raise EmbeddedError(
                f"The temporary folder {place} cannot be used ({_reason_of(error)}): name another by TMPDIR."
            ) from error
        return folder

    @property
    def name(self) -> str:
        """What the names of the server's shared memory begin with."""
        return self.path.name

    @property
    def backends(self) -> Path:
        """Triton's Python backend, with this Python's stub, and our own ones."""
        return self.path / "backends"

    @property
    def models(self) -> Path:
        """The repository."""
        return self.path / "models"

    @property
    def programs(self) -> Path:
        """A Python that finds what this one does."""
        return self.path / "python" / "bin"

    @property
    def libraries(self) -> list[Path]:
        """What the loader must search."""
        return sorted((self.path / "libraries").iterdir())

    def plain(self, text: str) -> str:
        """A message of the server's with the repository's own path."""
        return text.replace(str(self.models), str(self.repository))

    def close_shared_memory(self) -> None:
        """Keep other users out of the server's shared memory."""
        for region in _regions(self.name):
            with contextlib.suppress(FileNotFoundError):
                region.chmod(0o600)

    def remove(self) -> None:
        """Delete it and the server's shared memory; once more does nothing."""
        remove_shared_memory(self.name)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _fill(self, installation: Installation) -> None:
        # Copied, not linked: Triton refuses a backend whose library resolves to a place outside its folder.
        python = Path(shutil.copytree(installation.backends / "python", self.backends / "python", ignore=_no_caches))
        stub = Path(shutil.copy(installation.stub, python))
        stub.chmod(0o755)
        shutil.copytree(OWN_BACKENDS, self.backends, dirs_exist_ok=True, ignore=_no_caches)
        self.models.symlink_to(self.repository)
        _link_all(self.path / "libraries", installation.library_folders)
        self._make_python()

    def _make_python(self) -> None:
        """A virtual environment of this Python with the packages that the gateway has, wherever it has them from."""
        base, environment = self.path / "base", self.programs.parent
        base.symlink_to(sys.base_prefix)
        self.programs.mkdir(parents=True)
        (self.programs / "python3").symlink_to(os.path.realpath(sys.executable))
        settings = f"home = {base / 'bin'}\ninclude-system-site-packages = false\n"
        (environment / "pyvenv.cfg").write_text(settings)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = environment / "lib" / version / "site-packages"
        packages.mkdir(parents=True)
        # As the stub reads none of Python's environment variables, PYTHONDONTWRITEBYTECODE would not reach it.
        lines = ["import sys; sys.dont_write_bytecode = True"]
        lines += map(_path_line, _link_all(self.path / "packages", import_path()))
        (packages / "gateway.pth").write_text("".join(f"{line}\n" for line in lines))


def _path_line(package_folder: Path) -> str:
    """A line of a .pth file that has Python search a folder, and what the folder's own such files name."""
    if package_folder.readlink().name in ("site-packages", "dist-packages"):
        return f"import site; site.addsitedir({str(package_folder)!r})"
    return str(package_folder)


def _link_all(folder: Path, targets: Sequence[Path]) -> list[Path]:
    """Links in a new folder, which sort as the targets do."""
    folder.mkdir()
    links = [folder / f"{number:03d}" for number in range(len(targets))]
    for link, target in zip(links, targets, strict=True):
        link.symlink_to(target)
    return links


def temporary_folder() -> Path:
    """Where run folders are: what TMPDIR says, or the first of the usual places where that is no plain path.

    Raises:
        EmbeddedError: there is none.
    """
    try:
        named = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise EmbeddedError("No temporary folder can be written: name one by TMPDIR.") from error
    for place in map(os.path.abspath, (named, *USUAL_PLACES)):
        if PLAIN_PATH.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise EmbeddedError(
        f"Triton cannot be started in {named}: name a temporary folder of letters and digits by TMPDIR."
    )


def _make_locked(place: Path) -> tuple[Path, int]:
    """A new folder that only its owner may enter, and the lock on it."""
    unlocked = Path(tempfile.mkdtemp(prefix=".hypergen-", dir=place))
    lock = os.open(unlocked, os.O_RDONLY)
    # Where the file system has no locks, nobody else gets one either and takes it for abandoned.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Only now by the name that `remove_abandoned` looks for. What cleans up temporary folders by age respects the lock.
    path = unlocked.with_name(f"{PREFIX}{os.getpid()}-{unlocked.name.rpartition('-')[2]}")
    unlocked.rename(path)
    return path, lock


def _check_programs_run(folder: Path) -> None:
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(errno.EACCES, "no programs may be run from there")


def _reason_of(error: OSError) -> str:
    """In the system's words. `copytree` hands over what happened to each file, as text."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2]).partition("] ")[2].partition(":")[0]
    return error.strerror or str(error)


def remove_abandoned() -> None:
    """End and delete what servers left whose gateway was killed: processes that hang, folders, shared memory.

    A gateway that lives holds a lock on its folder, in whatever container it runs. Whatever goes wrong with others'
    remains is no reason not to start.
    """
    for folder in temporary_folder().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(folder):
            _kill_processes(folder)
            remove_shared_memory(folder.name)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While it lasts, nobody else has the folder. Raises OSError where somebody has, or it is another user's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(folder))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _kill_processes(run_folder: Path) -> None:
    """A server ends with its gateway, unless it hears no signal any more."""
    for process in psutil.process_iter():
        # Nor may clearing up after another keep this one from its start.
        with contextlib.suppress(psutil.Error, OSError):
            if process.name().startswith(PROCESS_NAMES) and any(str(run_folder) in each for each in process.cmdline()):
                process.kill()
                process.wait(KILL_SECONDS)


def remove_shared_memory(run_folder: str) -> None:
    """Delete the regions of the server that runs or ran on the folder of this name."""
    for region in _regions(run_folder):
        with contextlib.suppress(OSError):
            region.unlink()


def _regions(run_folder: str) -> Iterator[Path]:
    """A server's regions, whose names begin with its folder's."""
    return SHARED_MEMORY.glob(f"{run_folder}*")
