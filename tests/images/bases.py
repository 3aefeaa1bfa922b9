"""The images that ours are built on: the real ones where a registry is reached, otherwise stand-ins made here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from hypergen_gateway.embedded.installation import find_installation
from images.podman import build, output_of, podman
from support.compose_file import ROOT

STANDIN = Path(__file__).parent / "standin"
PYTHON = "localhost/hypergen-standin-python:3.11"
TRITON = "localhost/hypergen-standin-triton"
NO_CACHES = shutil.ignore_patterns("__pycache__")
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "ca-certificates,libpython3.11,python-is-python3,python3,python3-venv"
# NvInferVersion.h: what getInferLibVersion() returns for 11.1.0 is 110100.
LIBNVINFER = "int getInferLibVersion() {{ return {major} * 10000 + {minor} * 100 + {patch}; }}"


def default_of(dockerfile: str, argument: str) -> str:
    """The default of a Dockerfile's build argument."""
    found = re.search(rf"^ARG {argument}=(.+)$", (ROOT / "docker" / f"{dockerfile}.Dockerfile").read_text(), re.M)
    assert found is not None, argument
    return found[1]


def python_image(scratch: Path) -> str:
    """The base of the gateway's and the CPU's image."""
    real = f"docker.io/library/{default_of('gateway', 'PYTHON_IMAGE')}"
    if podman("pull", "--quiet", real, timeout=1200).returncode == 0:
        return real
    if podman("image", "exists", PYTHON).returncode != 0:
        bootstrap(scratch / "debian")
    return PYTHON


def bootstrap(folder: Path) -> None:
    """Make a base of Debian's packages: what python:3.11-slim-bookworm has, with Debian's own Python."""
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder), MIRROR]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    for cache in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(folder / cache)
        (folder / cache / "partial").mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    subprocess.run(["tar", "--numeric-owner", "-C", str(folder), "-cf", str(archive), "."], check=True)
    output_of("import", archive, PYTHON)
    archive.unlink()


def triton_image(scratch: Path, base: str) -> str:
    """A stand-in of NVIDIA's image on Debian: its Triton is that of the wheel."""
    context = scratch / "triton"
    fill_context(context)
    done = build(STANDIN / "triton.Dockerfile", TRITON, context, {"BASE": base}, scratch)
    assert done.returncode == 0, done.stderr[-4000:]
    return TRITON


def fill_context(context: Path) -> None:
    """What the stand-in copies: the wheel's files at NVIDIA's paths, and our backend with the package it is in."""
    installation = find_installation()
    server = context / "tritonserver"
    (server / "bin").mkdir(parents=True)
    shutil.copy(installation.server, server / "bin")
    shutil.copytree(installation.library_folders[0], server / "lib")
    shutil.copytree(installation.caches, server / "caches")
    backends = Path(shutil.copytree(installation.backends, server / "backends", ignore=NO_CACHES))
    Path(shutil.copy(installation.stub, backends / "python")).chmod(0o755)
    # It imports itself as a part of our package, of which nothing else is needed.
    ours = Path("hypergen_gateway", "embedded", "backends")
    for target in (backends, context / ours):
        shutil.copytree(ROOT / "gateway" / ours, target, dirs_exist_ok=True, ignore=NO_CACHES)
    shutil.copy(STANDIN / "nvidia_entrypoint.sh", context)
    major, minor, patch = default_of("export", "TENSORRT").split(".")[:3]
    source = LIBNVINFER.format(major=major, minor=minor, patch=patch)
    compile_library = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(context / "libnvinfer.so.11"), "-"]
    subprocess.run(compile_library, input=source, text=True, check=True)
