"""The images, built by podman and run as compose.yaml runs them. Only with `--images`: `make images`.

The first build takes minutes; later ones reuse its layers. Where no registry is reached, the images stand on stand-ins
(see bases.py): what NVIDIA's own image, its TensorRT and a GPU would do remains untried there.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from images.bases import default_of, python_image, triton_image
from images.compose import Project
from images.podman import podman
from support.compose_file import ROOT

NEEDED = ("podman", "debootstrap", "catatonit")
IMAGES = ("gateway", "cpu", "triton", "export")
PYPI = "https://pypi.org/simple"
Ran = Callable[[str, str, str, float], None]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these tests out unless they are asked for."""
    return None if config.getoption("--images") else True


@pytest.fixture(scope="session", autouse=True)
def _programs() -> None:
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} must be installed first")
    if os.getuid() != 0:
        pytest.skip("images are built as root")
    if (problem := podman("info")).returncode != 0:
        pytest.skip(f"podman cannot run here: {problem.stderr.strip().rpartition(chr(10))[2]}")


@pytest.fixture
def ran(record_property: Callable[[str, object], None]) -> Ran:
    """Records a row of the table: image, what ran in it, what came of it, seconds."""

    def record(image: str, what: str, result: str, seconds: float) -> None:
        record_property("image", (image, what, result, f"{seconds:.0f}"))

    return record


@dataclass(frozen=True)
class Images:
    """The images of compose.yaml, built when they are first asked for: build arguments, and seconds of the builds."""

    project: Project
    arguments: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    def tag(self, name: str) -> str:
        """The image of a service."""
        if name not in self.seconds:
            began = time.monotonic()
            self.project.build(name, self.arguments)
            self.seconds[name] = time.monotonic() - began
        return self.project.image(name)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """All four, on the bases that can be had."""
    scratch = tmp_path_factory.mktemp("bases")
    python = python_image(scratch)
    triton = os.environ.get("TRITON_IMAGE") or triton_image(scratch, python)
    arguments = {"PYTHON_IMAGE": python, "TRITON_IMAGE": triton, "TORCH_INDEX": torch_index()}
    return Images(Project.read("hypergen-images", {}), arguments)


def torch_index() -> str:
    """PyTorch's index of CPU builds if it answers; otherwise torch must be where this machine's pip looks."""
    index = os.environ.get("TORCH_INDEX") or default_of("cpu", "TORCH_INDEX")
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=10):
            return index
    except OSError:
        return PYPI


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A folder with a command `docker` that is images/compose.py."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT / "tests"} exec {sys.executable} -m images.compose "$@"\n')
    program.chmod(0o755)
    return program.parent


@contextmanager
def removed(container: str) -> Iterator[None]:
    """Remove the container afterwards."""
    try:
        yield
    finally:
        podman("rm", "--force", "--time", "10", container)
