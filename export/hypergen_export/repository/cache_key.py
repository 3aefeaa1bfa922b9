"""Keys that change when an export would come out differently, from what is on the disk and without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.hashes import ContentHashes

_PACKAGE = Path(__file__).parents[1]
# Sources that decide what a component's ONNX is, and what plan is built of it; others decide what stands around them.
_PLAN = ("engines/profiles.py", "engines/tensorrt.py")
_MERGING = ("checkpoints/lora.py", "conversion/merging.py")
_CONVERSION = (
    "checkpoints/components.py",
    "conversion/examples.py",
    "conversion/wrappers.py",
    "conversion/loading.py",
    "conversion/onnx.py",
    "conversion/parity.py",
)


def component_key(checkpoint: Checkpoint, component: Component, hashes: ContentHashes) -> str:
    """Key of a component's ONNX: the module's files, the LoRA merged into them, and the sources that convert them."""
    folder = checkpoint.folder / component.module
    return _digest(
        component.name,
        component.wrapper,
        dict(checkpoint.sizes),
        _contents([folder / "config.json", *(_PACKAGE / name for name in _CONVERSION)]),
        [(path.name, hashes(path)) for path in weight_files(checkpoint, component.module)],
        *_lora_parts(component),
    )


def weight_files(checkpoint: Checkpoint, module: str) -> list[Path]:
    """The files that hold the module's weights."""
    return [checkpoint.folder / module / name for name in checkpoint.weights(module).files]


def plan_key(onnx_key: str, *circumstances: Any) -> str:
    """Key of a TensorRT plan: the ONNX that it is built of, and all that the build depends on beside it."""
    return _digest(onnx_key, repr(circumstances), _contents(_PACKAGE / name for name in _PLAN))


def tokenizer_key(checkpoint: Checkpoint, tokenizer: str) -> str:
    """Key of the file that the sampler reads in place of the folder `tokenizer`."""
    files = (path for path in (checkpoint.folder / tokenizer).iterdir() if path.is_file())
    return _digest(dict(checkpoint.sizes), _contents([*files, _PACKAGE / "conversion" / "tokenizer.py"]))


def repository_key(parts: Iterable[str], settings: dict[str, str], sources: Iterable[Path]) -> str:
    """Key of a whole repository: its parts' keys, every setting, and all files that shape the rest."""
    return _digest(list(parts), settings, _contents([*sources, *_PACKAGE.rglob("*.py")]))


def _lora_parts(component: Component) -> list[Any]:
    """By the file's content: it is small, and its name and time say little."""
    if component.lora is None:
        return []
    return [component.lora.sha256, component.lora.scale, _contents(_PACKAGE / name for name in _MERGING)]


def _contents(paths: Iterable[Path]) -> list[tuple[str, str]]:
    # In the order of their names: that of their paths would change with the place of the checkpoint.
    return sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
