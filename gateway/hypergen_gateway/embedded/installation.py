"""Where the pip-installed Triton lies, and whether this Python can run its models.

Knows the layout of the wheel `nvidia-pytriton` and of Python's own shared library.
"""

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
    """The parts of Triton that a server is put together from."""

    server: Path
    """The executable `tritonserver`."""
    backends: Path
    """Holds the Python backend."""
    caches: Path
    stub: Path
    """The process that runs a Python model, built for this very Python."""
    library_folders: tuple[Path, ...]
    """What the loader must search: Triton's libraries and libpython's folder."""


# Those that Triton's wheel has a stub for and numpy 1, which it needs, a wheel.
PYTHONS = ((3, 10), (3, 11), (3, 12))


def find_installation() -> Installation:
    """Find the Triton that pip installed beside this Python.

    Raises:
        EmbeddedError: it is not for this Python, is not installed, or libpython is missing.
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
    """Raises EmbeddedError for a Python that cannot run the embedded Triton."""
    if version not in PYTHONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise EmbeddedError(
            f"The embedded Triton runs on Python {known}, and this is {version[0]}.{version[1]}: "
            "use one of them, or --triton-url with a Triton that runs elsewhere."
        )


def find_package(name: str) -> Path:
    """The folder of an installed package."""
    # Found, not imported: importing pytriton starts threads and reads configuration of its own.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "Triton is not installed here: pip install 'hypergen-triton[all]', or use --triton-url with one that runs."
        )
    return Path(spec.origin).parent


def find_stub(stubs: Path) -> Path:
    """The stub of this Python among those that came with Triton."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.exists():
        known = ", ".join(sorted((folder.name for folder in stubs.iterdir()), key=_as_numbers))
        raise EmbeddedError(f"The installed Triton has no stub for Python {version}: use one of {known}.")
    return stub


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def find_libpython(folders: Iterable[Path]) -> Path:
    """The first folder with this Python's shared library: the stub is linked against it, Python itself may not be."""
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
