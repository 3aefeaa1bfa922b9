"""The files a server is started on: backends put together for this Python, in a folder that lives as long as it runs.

Knows where Triton looks for backends, and what a server leaves behind that could not clean up.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import Installation

PREFIX = "hypergen-triton-"
OWN_BACKENDS = Path(__file__).parent / "backends"

_no_caches = shutil.ignore_patterns("__pycache__")


def remove_abandoned() -> None:
    """Delete what servers left whose gateway was killed: their folders and their shared memory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            remove_shared_memory(folder)
            shutil.rmtree(folder, ignore_errors=True)


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
