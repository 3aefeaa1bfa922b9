"""Checkpoints from the Hugging Face hub: a complete cached snapshot is used unchanged, anything else is downloaded.

Only the files that an export reads are downloaded: no other variants, no safety checker, no single-file copies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from hypergen_export.checkpoints.families import FAMILIES
from hypergen_export.checkpoints.weights import VOCABULARIES, missing_shards, select_weights
from hypergen_export.errors import MissingDependencyError, UnknownModelError, first_line

# Whether a module's weights are read, not only its config.
IsNeeded = Callable[[str], bool]
_SMALL_FILES = (".json", ".txt")


def find_snapshot(model: str, is_needed: IsNeeded = lambda _: True) -> Path:
    """The folder of a hub id's snapshot with all files that an export reads. Raises UnknownModelError.

    Of modules that are not needed, the weights are left out.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"{model}: the hub needs: pip install 'hypergen-triton[export]'") from error
    # A restarted server must find the weights it served before, even without a network, so the hub is not asked for a
    # newer revision while a complete snapshot is cached.
    missing = ""
    try:
        folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
        missing = first_missing_file(folder, is_needed)
        if not missing:
            return folder
    except (OSError, ValueError):
        pass  # not cached, or not a hub id; the hub's own error is more specific
    try:
        names = [file.rfilename for file in huggingface_hub.HfApi().model_info(model).siblings or []]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=required_files(names, is_needed)))
    except Exception as error:  # the hub client and its transports raise many kinds
        local = f"the cached copy lacks {missing}" if missing else "no such folder"
        raise UnknownModelError(f"{model}: {local}, and the hub cannot provide it ({first_line(error)})") from error


def find_module_snapshot(module: str) -> Path:
    """The folder of a hub id's snapshot that is one module, such as a VAE. Raises UnknownModelError."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"{module}: the hub needs: pip install 'hypergen-triton[export]'") from error
    try:
        folder = Path(huggingface_hub.snapshot_download(module, local_files_only=True))
        if not all(map(_missing_of_module, (folder, folder / "vae"))):
            return folder
    except (OSError, ValueError):
        pass  # not cached
    try:
        names = [file.rfilename for file in huggingface_hub.HfApi().model_info(module).siblings or []]
        weights = select_weights(name for name in names if "/" not in name)
        return Path(
            huggingface_hub.snapshot_download(
                module,
                allow_patterns=["config.json", *(weights.files if weights else ()), "vae/*.json", "vae/*.safetensors"],
            )
        )
    except Exception as error:  # the hub client and its transports raise many kinds
        raise UnknownModelError(
            f"{module}: no such folder, and the hub cannot provide it ({first_line(error)})"
        ) from error


def required_files(names: Iterable[str], is_needed: IsNeeded = lambda _: True) -> list[str]:
    """The files of a hub repository that an export needs, or that show why it cannot be exported."""
    names = list(names)
    paths = [name for name in names if "/" not in name and name.endswith(".json")]
    for module in _modules():
        files = _files_in(names, module)
        weights = select_weights(files) if is_needed(module) else None
        paths += [f"{module}/{file}" for file in files if file == "config.json" or (weights and file in weights.files)]
    for folder in ("scheduler", *_tokenizers()):
        paths += [f"{folder}/{file}" for file in _files_in(names, folder) if file.endswith(_SMALL_FILES)]
    return paths


def first_missing_file(folder: Path, is_needed: IsNeeded = lambda _: True) -> str:
    """The first file that an export needs and the snapshot lacks; empty if it is complete.

    Checks the modules, tokenizers and scheduler that the index lists and any family has. An unsupported pipeline needs
    only the index.
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
        *(_missing_of_module(folder / part, is_needed(part)) for part in _modules() if part in parts),
        *(_missing_of_tokenizer(folder / part) for part in _tokenizers() if part in parts),
        "" if (folder / "scheduler" / "scheduler_config.json").is_file() else "scheduler/scheduler_config.json",
    )
    return next(filter(None, missing), "")


def _missing_of_module(folder: Path, needs_weights: bool = True) -> str:
    if not (folder / "config.json").is_file():
        return f"{folder.name}/config.json"
    if not needs_weights:
        return ""
    weights = select_weights(path.name for path in folder.iterdir() if path.is_file())
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


def _files_in(names: Iterable[str], folder: str) -> list[str]:
    paths = (PurePosixPath(name) for name in names)
    return [path.name for path in paths if path.parent == PurePosixPath(folder)]
