"""The files a server is started on: backends put together for this Python, in a folder that lives as long as it runs.

Knows where Triton looks for backends.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import Installation

OWN_BACKENDS = Path(__file__).parent / "backends"

_no_caches = shutil.ignore_patterns("__pycache__")


def make_run_folder(installation: Installation) -> Path:
    """A new temporary folder with `backends/python` (with this Python's stub) and our own Python-based backends.

    Raises:
        EmbeddedError: the temporary folder cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="hypergen-triton-"))
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
