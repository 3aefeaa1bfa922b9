"""Checkpoints of the Hugging Face hub: what is already here is used as it is, the rest is fetched once.

Only the files that an export reads are fetched: no other variants, no safety checker, no single-file copies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hypergen_export.components import FAMILIES
from hypergen_export.errors import MissingDependencyError, UnknownModelError, first_line
from hypergen_export.weights import choose_weights

_SMALL_FILES = (".json", ".txt")


def find_snapshot(model: str) -> Path:
    """The folder of a hub id's snapshot, complete for an export. Raises UnknownModelError."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"{model}: fetching from the hub needs hypergen-triton[export]") from error
    # A server that restarts must find the very weights it served before, and without a network: no look at the hub
    # for a newer revision while a complete snapshot is here.
    try:
        folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
        if _is_complete(folder):
            return folder
    except (OSError, ValueError):
        pass  # not in the cache, or an id that the hub will refuse with a better message
    try:
        names = [file.rfilename for file in huggingface_hub.HfApi().model_info(model).siblings or []]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted_files(names)))
    except Exception as error:  # the one gate for whatever the hub's client and its transports raise
        raise UnknownModelError(
            f"{model}: neither a folder nor to be had from the hub ({first_line(error)})"
        ) from error


def wanted_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that an export reads: enough to say what is wrong with one that is no pipeline."""
    names = list(names)
    wanted = [name for name in names if "/" not in name and name.endswith(".json")]
    for module in _modules():
        files = _within(names, module)
        weights = choose_weights(files)
        wanted += [f"{module}/{file}" for file in files if file == "config.json" or (weights and file in weights.files)]
    for folder in _other_folders():
        wanted += [f"{folder}/{file}" for file in _within(names, folder) if file.endswith(_SMALL_FILES)]
    return wanted


def _is_complete(folder: Path) -> bool:
    """Whether the weights of all modules that the index lists, as far as any family has them, are there."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    parts = index if isinstance(index, dict) else {}
    return all(choose_weights(_within(names, module)) for module in _modules() if (parts.get(module) or [None])[0])


def _modules() -> list[str]:
    return sorted({module for family in FAMILIES for module in family.modules})


def _other_folders() -> list[str]:
    return sorted({"scheduler", *(tokenizer for family in FAMILIES for tokenizer in family.tokenizers)})


def _within(names: Iterable[str], folder: str) -> list[str]:
    paths = (PurePosixPath(name) for name in names)
    return [path.name for path in paths if path.parent == PurePosixPath(folder)]
