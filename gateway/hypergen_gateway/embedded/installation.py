"""Locates the Triton from the wheel `nvidia-pytriton`, and Python's shared library."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hypergen_gateway.embedded.errors import EmbeddedError


@dataclass(frozen=True)
class Installation:
    """Paths of the installed Triton."""

    server: Path
    """The executable `tritonserver`."""
    backends: Path
    """Contains the Python backend."""
    caches: Path
    stub: Path
    """The executable that runs a Python model, built for this Python version."""
    library_folders: tuple[Path, ...]
    """Folders for the loader: Triton's libraries and libpython."""


# Versions with both a stub in Triton's wheel and a wheel of numpy 1, which Triton needs.
PYTHONS = ((3, 10), (3, 11), (3, 12))


def find_installation() -> Installation:
    """Find the Triton installed in this Python environment.

    Raises:
        EmbeddedError: Triton is not installed or does not support this Python, or libpython is missing.
    """
    check_python(sys.version_info[:2])
    package = find_package("pytriton")
    root = package / "tritonserver"
    return Installation(
        server=root / "bin" / "tritonserver",
        backends=root / "backends",
        caches=root / "caches",
        stub=find_stub(root / "python_backend_stubs"),
        library_folders=(package.parent / "nvidia_pytriton.libs", find_libpython(_library_folders())),
    )


def check_python(version: tuple[int, int]) -> None:
    """Raise EmbeddedError if the embedded Triton does not support this Python version."""
    if version not in PYTHONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise EmbeddedError(
            f"The embedded Triton needs Python {known}, and this is {version[0]}.{version[1]}: "
            "use one of them, or --triton-url with an external Triton."
        )


def find_package(name: str) -> Path:
    """The folder of an installed package."""
    # Not imported, as importing pytriton starts threads and reads configuration.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "Triton is not installed: pip install 'hypergen-triton[all]', or use --triton-url with an external Triton."
        )
    return Path(spec.origin).parent


def find_stub(stubs: Path) -> Path:
    """The stub for this Python version."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.exists():
        names = (folder.name for folder in stubs.iterdir())
        known = ", ".join(sorted(names, key=lambda name: [int(part) for part in name.split(".")]))
        raise EmbeddedError(f"The installed Triton has no stub for Python {version}: use one of {known}.")
    return stub


def find_libpython(folders: Iterable[Path]) -> Path:
    """The first folder with this Python's shared library, which the stub needs even if Python itself is static."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for folder in folders:
        if (folder / name).exists():
            return folder
    raise EmbeddedError(
        f"{name} was not found, which Triton's Python backend needs: "
        f"apt-get install {name.removesuffix('.so.1.0')} (or build Python with --enable-shared)."
    )


def _library_folders() -> list[Path]:
    library, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH")
    places = [library, f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/local/lib", f"{sys.base_prefix}/lib"]
    return [Path(place) for place in places if place]
