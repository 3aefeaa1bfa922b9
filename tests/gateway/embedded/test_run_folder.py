"""The folder that a server runs on, and what is done about those of killed gateways."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.run_folder import make_run_folder, remove_abandoned


def test_it_holds_the_python_backend_with_its_stub_and_our_openvino_backend() -> None:
    folder = make_run_folder(find_installation())
    try:
        stub = folder / "backends" / "python" / "triton_python_backend_stub"
        assert os.access(stub, os.X_OK)
        library = folder / "backends" / "python" / "libtriton_python.so"
        assert library.is_file()
        assert not library.is_symlink(), "Triton refuses a library outside its backend's folder"
        assert (folder / "backends" / "openvino" / "model.py").is_file()
    finally:
        shutil.rmtree(folder)


def test_what_a_dead_gateway_left_is_removed_and_a_living_ones_is_kept() -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    temporary = Path(tempfile.gettempdir())
    abandoned = temporary / f"hypergen-triton-{int(dead.stdout)}-test"
    living = temporary / f"hypergen-triton-{os.getpid()}-test"
    region = Path("/dev/shm") / f"{abandoned.name}-region"
    abandoned.mkdir()
    living.mkdir()
    region.touch()
    try:
        remove_abandoned()
        assert not abandoned.exists()
        assert not region.exists()
        assert living.exists()
    finally:
        living.rmdir()
