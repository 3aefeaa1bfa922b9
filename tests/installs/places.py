"""Where HyperGen is installed: the Pythons of this machine, copies of the checkout, and environments with its wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.environments import ROOT, ToolError, run

PYTHONS = ("3.11", "3.12", "3.10")
# Somebody without an account, as in a container.
USER = 10001
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
UV = "uv==0.13.9"
INSTALL_SECONDS = 600.0
# uv does not read pip's settings: those that a machine behind a mirror has in its variables.
UV_NAMES = {"PIP_FIND_LINKS": "UV_FIND_LINKS", "PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_EXTRA_INDEX_URL": "UV_INDEX"}


def find_python(version: str, prefix: Sequence[str] = ()) -> str:
    """A Python of this version that runs behind `prefix`, from PATH or pyenv. Raises ToolError if there is none."""
    for name in _candidates(version):
        # By a shell, as setpriv itself still opens what only root may.
        probe = [*prefix, "/bin/sh", "-c", 'exec "$0" -c ""', name]
        done = subprocess.run(probe, capture_output=True, check=False)
        if done.returncode == 0:
            return name
    raise ToolError(f"there is no Python {version} here")


def _candidates(version: str) -> Iterator[str]:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")))
    for folder in os.environ["PATH"].split(os.pathsep):
        if (Path(folder) / f"python{version}").is_file():
            yield f"{folder}/python{version}"


def python_for(prefix: Sequence[str]) -> str:
    """A supported Python that runs behind `prefix`. Raises ToolError if there is none."""
    for version in PYTHONS:
        try:
            return find_python(version, prefix)
        except ToolError:
            continue
    raise ToolError(f"no Python that the user {USER} may run is {', '.join(PYTHONS)}")


def torch_release() -> str:
    """The requirement that `make serve` installs."""
    (found,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return str(found)


def copy_checkout(folder: Path) -> Path:
    """What git tracks, as it is now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def build_wheel(folder: Path) -> Path:
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(python: str, folder: Path, requirements: Sequence[str]) -> Path:
    """Make an environment with pip, and return its `hypergen`. Raises ToolError."""
    run([python, "-m", "venv", str(folder)], INSTALL_SECONDS)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *requirements], INSTALL_SECONDS)
    return folder / "bin" / "hypergen"


def uv_environment() -> Mapping[str, str]:
    """Variables for uv; it takes the Pythons that are there."""
    settings = {name: os.environ[ours] for ours, name in UV_NAMES.items() if os.environ.get(ours)}
    return {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", **settings}


def uv_install(uv: Path, python: str, folder: Path, requirements: Sequence[str]) -> Path:
    """Make an environment with uv, and return its `hypergen`. Raises ToolError."""
    run([str(uv), "venv", "--quiet", "--python", python, str(folder)], INSTALL_SECONDS, **uv_environment())
    into = ["--quiet", "--python", str(folder / "bin" / "python")]
    run([str(uv), "pip", "install", *into, *requirements], INSTALL_SECONDS, **uv_environment())
    return folder / "bin" / "hypergen"


def uv_tool_install(uv: Path, python: str, folder: Path, requirements: Sequence[str]) -> Path:
    """Install as a tool, the first requirement with the others beside it. Raises ToolError."""
    tool, *others = requirements
    places = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    beside = [word for other in others for word in ("--with", other)]
    command = [str(uv), "tool", "install", "--quiet", "--python", python, *beside, tool]
    run(command, INSTALL_SECONDS, **uv_environment(), **places)
    return folder / "bin" / "hypergen"
