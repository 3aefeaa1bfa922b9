"""What child processes get of the environment and the import path that this process was started with.

The current folder may hold somebody else's checkpoint, so no child looks there for modules, programs or libraries. An
empty entry of a search path means that folder, and so does the first entry of Python's own after `-c` and `-m`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
# bash, by which Triton's Python backend starts a model's process, would run the one and obey the others.
SHELL_SETTINGS = frozenset({"BASH_ENV", "BASHOPTS", "ENV", "SHELLOPTS"})
PACKAGES = Path(__file__).parents[2]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with search paths of absolute folders alone and a PATH in any case."""
    child = {name: value for name, value in environment.items() if name not in SHELL_SETTINGS}
    for name in SEARCH_PATHS:
        if folders := absolute_folders(child.pop(name, "")):
            child[name] = os.pathsep.join(folders)
    return {"PATH": os.defpath, **child}


def absolute_folders(search_path: str) -> list[str]:
    """The entries, the current folder left out."""
    return [str(Path(entry).absolute()) for entry in search_path.split(os.pathsep) if Path(entry) != Path()]


def import_path() -> list[Path]:
    """Where this process finds packages: `sys.path` without the standard library and the current folder."""
    named = {*map(Path, absolute_folders(os.environ.get("PYTHONPATH", ""))), PACKAGES}
    left_out = {*_standard_library(), *_current_folder()} - named
    return [path for path in dict.fromkeys([*map(Path, filter(None, sys.path)), PACKAGES]) if path not in left_out]


def _standard_library() -> Iterator[Path]:
    for name in ("stdlib", "platstdlib"):
        folder = Path(sysconfig.get_path(name))
        yield from (folder, folder / "lib-dynload", folder.with_name(folder.name.replace(".", "") + ".zip"))


def _current_folder() -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):  # it was deleted
        yield Path.cwd()
