"""Checkpoints of the Hugging Face hub: what is already here is used as it is, the rest is fetched once.

Only the files that an export reads are fetched: no other variants, no safety checker, no single-file copies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hypergen_export.checkpoints.components import FAMILIES
from hypergen_export.checkpoints.weights import VOCABULARIES, choose_weights, missing_shards
from hypergen_export.errors import MissingDependencyError, UnknownModelError, first_line

_SMALL_FILES = (".json", ".txt")


def find_snapshot(model: str) -> Path:
    """The folder of a hub id's snapshot, complete for an export. Raises UnknownModelError."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"{model}: fetching from the hub needs hypergen-triton[export]") from error
    # A server that restarts must find the very weights it served before, and without a network: no look at the hub
    # for a newer revision while a complete snapshot is here.
    lacks = ""
    try:
        folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
        lacks = what_is_missing(folder)
        if not lacks:
            return folder
    except (OSError, ValueError):
        pass  # not in the cache, or an id that the hub will refuse with a better message
    try:
        names = [file.rfilename for file in huggingface_hub.HfApi().model_info(model).siblings or []]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted_files(names)))
    except Exception as error:  # the one gate for whatever the hub's client and its transports raise
        here = f"its copy here lacks {lacks}, and it is not" if lacks else "neither a folder nor"
        raise UnknownModelError(f"{model}: {here} to be had from the hub ({first_line(error)})") from error


def wanted_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that an export reads: enough to say what is wrong with one that is no pipeline."""
    names = list(names)
    wanted = [name for name in names if "/" not in name and name.endswith(".json")]
    for module in _modules():
        files = _within(names, module)
        weights = choose_weights(files)
        wanted += [f"{module}/{file}" for file in files if file == "config.json" or (weights and file in weights.files)]
    for folder in ("scheduler", *_tokenizers()):
        wanted += [f"{folder}/{file}" for file in _within(names, folder) if file.endswith(_SMALL_FILES)]
    return wanted


def what_is_missing(folder: Path) -> str:
    """The first file of a snapshot that an export would read in vain; empty where it is complete.

    Of modules, tokenizers and scheduler as the index lists them, as far as any family has them. Of a pipeline that no
    family serves, the index alone is read.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        listed = index.items()
    except (OSError, ValueError, AttributeError):
        return "model_index.json"
    if not any(index.get("_class_name") in family.pipelines for family in FAMILIES):
        return ""
    parts = [part for part, classes in listed if isinstance(classes, list) and any(classes)]
    missing = (
        *(_missing_of_module(folder / part) for part in _modules() if part in parts),
        *(_missing_of_tokenizer(folder / part) for part in _tokenizers() if part in parts),
        "" if (folder / "scheduler" / "scheduler_config.json").is_file() else "scheduler/scheduler_config.json",
    )
    return next(filter(None, missing), "")


def _missing_of_module(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return f"{folder.name}/config.json"
    weights = choose_weights(path.name for path in folder.iterdir() if path.is_file())
    if weights is None:
        return f"{folder.name}'s weights"
    try:
        return next((f"{folder.name}/{file}" for file in missing_shards(folder, weights)), "")
    except ValueError as error:
        return f"{folder.name}'s index ({error})"


def _missing_of_tokenizer(folder: Path) -> str:
    complete = any(all((folder / file).is_file() for file in files) for files in VOCABULARIES)
    return "" if complete else f"{folder.name}'s vocabulary"


def _modules() -> list[str]:
    return sorted({module for family in FAMILIES for module in family.modules})


def _tokenizers() -> list[str]:
    return sorted({tokenizer for family in FAMILIES for tokenizer in family.tokenizers})


def _within(names: Iterable[str], folder: str) -> list[str]:
    paths = (PurePosixPath(name) for name in names)
    return [path.name for path in paths if path.parent == PurePosixPath(folder)]
