"""Python environments of their own, for what does not fit beside the project's packages: load tools and peers.

Each is a folder with a virtual environment, made once and kept; a change of what belongs in it installs again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
# On a slow machine: compiling a peer from source, or ten images of a large model under load, one after the other.
LIMIT_SECONDS = 3600


class ToolError(Exception):
    """A tool or a peer cannot be installed or does not do what it should; `str()` says what it said."""


def install(folder: Path, packages: Sequence[str]) -> Path:
    """Make the environment, if it is not there, and return its Python. Raises ToolError."""
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists() and done.read_text() == repr(tuple(packages)):
        return python
    print(f"Installing {', '.join(packages)} into {folder}", file=sys.stderr)
    if not (folder / "bin" / "pip").exists():
        run([sys.executable, "-m", "venv", str(folder)])
    run([str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *packages])
    done.write_text(repr(tuple(packages)))
    return python


def run(command: Sequence[str], limit: float = LIMIT_SECONDS, **environment: str) -> str:
    """What it says, of both its outputs. Raises ToolError where it fails or takes too long, with the end of that."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{name} took longer than {limit:,.0f} s") from error
    if done.returncode:
        raise ToolError(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout
