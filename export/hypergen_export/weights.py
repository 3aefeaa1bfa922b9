"""Weight files without torch: which of a module's to load, and what their headers and bytes tell.

The choice is by names alone, so that the hub can be asked before anything is fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<before>\w+?))?(?:-\d+-of-\d+)?(?:\.(?P<after>\w+?))?"
    r"\.(?P<format>safetensors|bin)(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)
# safetensors run no code when they are read; among them, full precision before half.
_FORMATS = ("safetensors", "bin")
_VARIANTS = ("", "fp16", "bf16")
_READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files of one format and variant ("" or what stands in their names, such as fp16)."""

    files: tuple[str, ...]
    format: str
    variant: str


def choose_weights(names: Iterable[str]) -> Weights | None:
    """The best complete set among the files of one module's folder; None where no file holds weights."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match:
            variant = match["before"] or match["after"] or match["index"] or ""
            groups.setdefault((match["format"], variant), []).append(name)
    if not groups:
        return None
    kind, variant = min(groups, key=_rank)
    return Weights(files=tuple(groups[kind, variant]), format=kind, variant=variant)


def float32_bytes(folder: Path, weights: Weights) -> int:
    """How many bytes the weights take in float32."""
    return sum(_float32_bytes(folder / name, weights) for name in weights.files if not name.endswith(".json"))


def safetensors_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says about its tensors, by name. Raises ValueError, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("it does not begin with a header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no json object")
    return header


def sha256(files: Iterable[Path]) -> str:
    """Hash of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _rank(group: tuple[str, str]) -> tuple[int, int, str]:
    kind, variant = group
    place = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
    return _FORMATS.index(kind), place, variant


def _float32_bytes(path: Path, weights: Weights) -> int:
    stored = path.stat().st_size
    if weights.format == "safetensors":
        return _safetensors_elements(path) * 4
    return stored * 2 if weights.variant in ("fp16", "bf16") else stored


def _safetensors_elements(path: Path) -> int:
    """Elements that a safetensors header declares; 0 for a broken file, which loading will report."""
    try:
        tensors = (entry for name, entry in safetensors_header(path).items() if name != "__metadata__")
        return sum(_product(entry["shape"]) for entry in tensors)
    except (ValueError, KeyError, TypeError):
        return 0


def _product(shape: list[int]) -> int:
    elements = 1
    for length in shape:
        elements *= length
    return elements
