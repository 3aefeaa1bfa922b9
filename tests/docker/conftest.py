"""What the tests of docker/ share: where it lies, the tools that judge it, and our own commands that read its words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from hypergen_gateway.cli import main

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
_BIN = Path(sys.executable).parent


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool that `make test` or `.ci/tools` has put beside this Python, or that is on the PATH."""
    found = shutil.which(name, path=f"{_BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: .ci/tools puts it into .venv/bin")
    return subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def read_command(words: Sequence[str]) -> dict[str, Any]:
    """What `hypergen WORDS…` would be called with. Raises click.UsageError where it would refuse them."""
    with click.Context(main) as context:
        command = main.get_command(context, words[0])
    assert command is not None, words
    with command.make_context(words[0], list(words[1:])) as parsed:
        return parsed.params
