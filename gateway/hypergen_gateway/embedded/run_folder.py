"""The run folder: a temporary folder with the files of one server run, and the removal of abandoned ones.

Triton's Python backend puts paths into a shell command without quotes, and its interpreter supports only ASCII paths.
So the repository, Triton's libraries, Python and its packages are reached through symbolic links in this folder, whose
own path is plain.
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
# At its start, each model's process takes 1 MiB of it, and a model has up to eight; tensors come on top.
LEAST_SHARED_MEMORY = 8 * 2**20
KILL_SECONDS = 5.0
OWN_BACKENDS = Path(__file__).parent / "backends"
OWN_FOLDERS_FIRST = Path(__file__).with_name("own_folders_first.py")
# Paths that need no quoting in a shell and can be an entry of a search path.
PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+@%=,-]+")
USUAL_PLACES = ("/tmp", "/var/tmp")
# Process names of Triton and its stubs, as Linux truncates them.
PROCESS_NAMES = ("tritonserver", "triton_python_b")

_no_caches = shutil.ignore_patterns("__pycache__")


class RunFolder:
    """A folder that is locked until it is removed or its process ends; see `remove_abandoned`."""

    def __init__(self, path: Path, repository: Path, lock: int) -> None:
        self.path = path
        self.repository = repository
        self._lock = contextlib.ExitStack()
        self._lock.callback(os.close, lock)

    @classmethod
    def make(cls, installation: Installation, repository: Path) -> RunFolder:
        """Create the run folder of a server for `repository`.

        Raises:
            EmbeddedError: the temporary folder is not writable, or programs cannot run there.
        """
        place = temporary_folder()
        try:
            path, lock = _make_locked(place)
            folder = cls(path, repository.absolute(), lock)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(folder.remove)
                if os.statvfs(path).f_flag & os.ST_NOEXEC:
                    raise OSError(errno.EACCES, "programs cannot run there")
                folder._fill(installation)
                on_failure.pop_all()
        except OSError as error:
            raise EmbeddedError(
                f"The temporary folder {place} cannot be used ({_reason_of(error)}): set TMPDIR to another."
            ) from error
        return folder

    @property
    def name(self) -> str:
        """Prefix of the names of the server's shared memory regions."""
        return self.path.name

    @property
    def backends(self) -> Path:
        """Triton's Python backend with the stub for this Python, and our own backends."""
        return self.path / "backends"

    @property
    def models(self) -> Path:
        """The repository."""
        return self.path / "models"

    @property
    def programs(self) -> Path:
        """The folder of a Python with the same packages as this one."""
        return self.path / "python" / "bin"

    @property
    def libraries(self) -> list[Path]:
        """Folders for the loader."""
        return sorted((self.path / "libraries").iterdir())

    def restore_paths(self, text: str) -> str:
        """A message of the server with the path of the repository instead of the link."""
        return text.replace(str(self.models), str(self.repository))

    def close_shared_memory(self) -> None:
        """Make the server's shared memory inaccessible to other users."""
        for region in _regions(self.name):
            with contextlib.suppress(FileNotFoundError):
                region.chmod(0o600)

    def remove(self) -> None:
        """Delete the folder and the server's shared memory. Can be called more than once."""
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
        """Create a virtual environment with the packages of this Python, wherever they are installed."""
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
        shutil.copy(OWN_FOLDERS_FIRST, packages)
        lines.append(f"import {OWN_FOLDERS_FIRST.stem}")
        (packages / "gateway.pth").write_text("".join(f"{line}\n" for line in lines))


def _path_line(package_folder: Path) -> str:
    """A line of a .pth file that adds a folder to `sys.path`, including the folder's own .pth files."""
    if package_folder.readlink().name in ("site-packages", "dist-packages"):
        return f"import site; site.addsitedir({str(package_folder)!r})"
    return str(package_folder)


def _link_all(folder: Path, targets: Sequence[Path]) -> list[Path]:
    """Create links in a new folder, with names in the order of the targets."""
    folder.mkdir()
    links = [folder / f"{number:03d}" for number in range(len(targets))]
    for link, target in zip(links, targets, strict=True):
        link.symlink_to(target)
    return links


def temporary_folder() -> Path:
    """The parent of run folders: TMPDIR or, if its path is not plain, the first suitable usual place.

    Raises:
        EmbeddedError: there is none.
    """
    try:
        named = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise EmbeddedError("There is no writable temporary folder: set TMPDIR to one.") from error
    for place in map(os.path.abspath, (named, *USUAL_PLACES)):
        if PLAIN_PATH.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise EmbeddedError(
        f"Triton cannot be started in {named}: set TMPDIR to a folder whose path has only letters and digits."
    )


def _make_locked(place: Path) -> tuple[Path, int]:
    """Create a folder that only its owner can access, and lock it."""
    unlocked = Path(tempfile.mkdtemp(prefix=".hypergen-", dir=place))
    lock = os.open(unlocked, os.O_RDONLY)
    # On a file system without locks, no other process can lock the folder and treat it as abandoned.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Renamed after locking, so that `remove_abandoned` sees only locked folders. Cleaners by age respect the lock, too.
    path = unlocked.with_name(f"{PREFIX}{os.getpid()}-{unlocked.name.rpartition('-')[2]}")
    unlocked.rename(path)
    return path, lock


def _reason_of(error: OSError) -> str:
    """The operating system's message. `copytree` raises one error with the messages of all files."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2]).partition("] ")[2].partition(":")[0]
    return error.strerror or str(error)


def remove_abandoned() -> None:
    """Remove what servers of killed gateways left behind: hanging processes, folders, shared memory.

    A running gateway holds a lock on its folder, even in another container. Errors are ignored, as they must not
    prevent a start.
    """
    for folder in temporary_folder().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(folder):
            _kill_processes(folder)
            remove_shared_memory(folder.name)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder. Raises OSError if it is locked or belongs to another user."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(folder))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _kill_processes(run_folder: Path) -> None:
    """Kill the processes of a run folder. Servers end with their gateway unless they hang."""
    for process in psutil.process_iter():
        # Errors must not prevent this server from starting.
        with contextlib.suppress(psutil.Error, OSError):
            if process.name().startswith(PROCESS_NAMES) and any(str(run_folder) in each for each in process.cmdline()):
                process.kill()
                process.wait(KILL_SECONDS)


def check_shared_memory() -> None:
    """Raise EmbeddedError if there is too little shared memory for a Triton to start."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except FileNotFoundError:
        free = 0
    else:
        if status.f_blocks == 0:  # a tmpfs without a limit
            return
        free = status.f_bavail * status.f_frsize
    if free < LEAST_SHARED_MEMORY:
        raise EmbeddedError(
            f"Triton needs at least {LEAST_SHARED_MEMORY / 2**20:.0f} MiB of shared memory, and {SHARED_MEMORY} has "
            f"{free / 2**20:.1f} MiB left: enlarge it, for a container with --shm-size=1g."
        )


def remove_shared_memory(run_folder: str) -> None:
    """Delete the shared memory of the server with the run folder of this name."""
    for region in _regions(run_folder):
        with contextlib.suppress(OSError):
            region.unlink()


def _regions(run_folder: str) -> Iterator[Path]:
    """The shared memory regions of a server, which are named after its run folder."""
    return SHARED_MEMORY.glob(f"{run_folder}*")
