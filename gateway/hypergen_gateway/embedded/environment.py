"""Environment and import path of child processes.

The current folder may contain an untrusted checkpoint, so no child searches it for modules, programs or libraries. An
empty entry of a search path means that folder, as does the first entry of `sys.path` after `python -c` or `-m`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
# Triton's Python backend starts model processes with bash, which would run the first and apply the others.
SHELL_SETTINGS = frozenset({"BASH_ENV", "BASHOPTS", "ENV", "SHELLOPTS"})
PACKAGES = Path(__file__).parents[2]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of `environment` with only absolute folders in search paths, and with a PATH."""
    child = {name: value for name, value in environment.items() if name not in SHELL_SETTINGS}
    for name in SEARCH_PATHS:
        if folders := absolute_folders(child.pop(name, "")):
            child[name] = os.pathsep.join(folders)
    return {"PATH": os.defpath, **child}


def absolute_folders(search_path: str) -> list[str]:
    """The entries of a search path as absolute paths, without the current folder."""
    return [str(Path(entry).absolute()) for entry in search_path.split(os.pathsep) if Path(entry) != Path()]


def import_path() -> list[Path]:
    """The folders of installed packages: `sys.path` without the standard library and the current folder."""
    named = {*map(Path, absolute_folders(os.environ.get("PYTHONPATH", ""))), PACKAGES}
    excluded = {*_standard_library(), *_current_folder()} - named
    return [path for path in dict.fromkeys([*map(Path, filter(None, sys.path)), PACKAGES]) if path not in excluded]


def _standard_library() -> Iterator[Path]:
    for name in ("stdlib", "platstdlib"):
        folder = Path(sysconfig.get_path(name))
        yield from (folder, folder / "lib-dynload", folder.with_name(folder.name.replace(".", "") + ".zip"))


def _current_folder() -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        yield Path.cwd()
