"""The files a server is started on: backends put together for this Python, in a folder that lives as long as it runs.

Knows where Triton looks for backends, and what a server leaves behind that could not clean up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import Installation

PREFIX = "hypergen-triton-"
KILL_SECONDS = 5.0
OWN_BACKENDS = Path(__file__).parent / "backends"

_no_caches = shutil.ignore_patterns("__pycache__")


def remove_abandoned() -> None:
    """End and delete what servers left whose gateway was killed: processes that hang, folders, shared memory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not _is_alive(int(owner)):
            _kill_processes(folder)
            remove_shared_memory(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """A zombie waits for whoever started it, and holds nothing any more."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_processes(run_folder: Path) -> None:
    """A server ends with its gateway, unless it hears no signal any more."""
    for process in psutil.process_iter():
        # Nor may clearing up after another keep this one from its start.
        with contextlib.suppress(psutil.Error, OSError):
            if any(str(run_folder) in argument for argument in process.cmdline()):
                process.kill()
                process.wait(KILL_SECONDS)


def remove_shared_memory(run_folder: Path) -> None:
    """Delete the regions of the server that runs or ran on this folder; their names begin with its name."""
    for region in Path("/dev/shm").glob(f"{run_folder.name}*"):
        region.unlink(missing_ok=True)


def make_run_folder(installation: Installation) -> Path:
    """A new temporary folder with `backends/python` (with this Python's stub) and our own Python-based backends.

    Raises:
        EmbeddedError: the temporary folder cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        # Copied, not linked: Triton refuses a backend whose library resolves to a place outside its folder.
        python = Path(
            shutil.copytree(installation.backends / "python", folder / "backends" / "python", ignore=_no_caches)
        )
        stub = Path(shutil.copy(installation.stub, python))
        stub.chmod(0o755)
        shutil.copytree(OWN_BACKENDS, folder / "backends", dirs_exist_ok=True, ignore=_no_caches)
    except OSError as error:
        raise EmbeddedError(
            f"Cannot write to the temporary folder {tempfile.gettempdir()}: {error.strerror}."
        ) from error
    return folder
