"""Weight files: selection of the files to load, and their headers. Does not import torch.

Files are selected by name alone, so that they can be selected before they are downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
# In order of preference: reading safetensors runs no code, and full precision comes before half.
_FORMATS = ("safetensors", "bin")
_VARIANTS = ("", "fp16", "bf16")
# Sets of files of which each is a vocabulary: of the byte-pair encodings of CLIP and Qwen, and of T5 and Gemma.
# transformers would need the package sentencepiece to read their other file.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_WITHOUT_SENTENCEPIECE = (("tokenizer.json",),)
_READ_BYTES = 2**20
_SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<count>\d+)")
_MOST_SHARDS = 1000
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files of one format and variant (empty, or the part of their names such as fp16)."""

    files: tuple[str, ...]
    format: str
    variant: str


def select_weights(names: Iterable[str]) -> Weights | None:
    """The preferred set of weight files in one module's folder; None if there is none."""
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


def vocabularies(tokenizer_class: str) -> tuple[tuple[str, ...], ...]:
    """The sets of files of which a tokenizer of this class needs one."""
    has_sentencepiece = tokenizer_class in ("transformers.T5Tokenizer", "transformers.GemmaTokenizer")
    return _WITHOUT_SENTENCEPIECE if has_sentencepiece else VOCABULARIES


def float32_bytes(folder: Path, weights: Weights) -> int:
    """Size of the weights in float32, in bytes."""
    return sum(_float32_bytes(folder / name, weights) for name in weights.files if not name.endswith(".json"))


def float32_pool_bytes(folder: Path, weights: Weights, rank: int) -> int:
    """Size in float32 of a rank pool for every matrix and kernel in safetensors files; 0 for broken files."""
    sides = 0
    for name in weights.files:
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            shapes = [tensor.shape for tensor in stored_tensors(folder / name).values()]
            sides += sum(shape[0] + math.prod(shape[1:]) for shape in shapes if len(shape) > 1)
    return sides * rank * 4


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file: `dtype` by safetensors' name, `offset` and `length` in bytes of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises ValueError, OSError."""
    header = safetensors_header(path)
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    return {
        name: StoredTensor(
            file=path,
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=data + entry["data_offsets"][0],
            length=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def stored_dtypes(folder: Path, weights: Weights) -> set[str]:
    """The types of the tensors in safetensors files, such as float32; empty for broken files."""
    found: set[str] = set()
    for name in weights.files:
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            found |= {tensor.dtype for tensor in stored_tensors(folder / name).values()}
    return {_DTYPES.get(dtype, dtype) for dtype in found}


def tensor_files(folder: Path, weights: Weights) -> list[Path]:
    """The files that hold the tensors: one, or the shards that the index names. Raises ValueError."""
    tensors = [file for file in weights.files if not file.endswith(".json")]
    whole = [file for file in tensors if not _SHARD.search(file)]
    if whole:
        return [folder / whole[0]]
    return [
        folder / name for index in weights.files if index not in tensors for name in sorted(_indexed(folder / index))
    ]


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors by name. Raises ValueError, OSError."""
    other = wrong_content(path)
    if other:
        raise ValueError(other)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("it does not start with a safetensors header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    _check_length(header, size - 8 - length)
    return header


def wrong_content(path: Path) -> str:
    """What a file holds instead of its content, judging by its first bytes; empty if nothing is wrong."""
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin:
        return "it is empty"
    if begin.startswith(b"version https://git-lfs.github.com/"):
        return "it is a git-LFS pointer: run 'git lfs pull' in its folder"
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<!", b"<html", b"<HTML", b"<?xml", b"<Error")):
        return "it is a web page, left by a failed download"
    return ""


def weight_file_problem(path: Path) -> str:
    """Why a weight file cannot be read, judging by its header and length; empty if nothing is wrong."""
    try:
        if path.suffix == ".safetensors":
            safetensors_header(path)
        return wrong_content(path)
    except (OSError, ValueError) as error:
        return str(error)


def missing_shards(folder: Path, weights: Weights) -> list[str]:
    """Shards that an index or the numbers in file names refer to and that do not exist. Raises ValueError."""
    expected = {name for file in weights.files if file.endswith(".json") for name in _indexed(folder / file)}
    for file in weights.files:
        match = _SHARD.search(file)
        if match:
            count = int(match["count"])
            numbers = (f"{number:0{len(match['number'])}}" for number in range(1, min(count, _MOST_SHARDS) + 1))
            expected |= {f"{file[: match.start('number')]}{number}{file[match.end('number') :]}" for number in numbers}
    return sorted(name for name in expected if not (folder / name).is_file())


def sha256(files: Iterable[Path]) -> str:
    """Hash of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _indexed(path: Path) -> set[str]:
    """The shards that an index names."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return {str(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: is not an index of weights ({error})") from error


def _check_length(header: dict[str, Any], given: int) -> None:
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (KeyError, TypeError, IndexError, ValueError):
        raise ValueError("its header does not give the tensors' offsets") from None
    if max(ends, default=0) > given:
        raise ValueError(f"it is truncated: {given:,} of {max(ends):,} bytes of weights")


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
    """Number of elements in a safetensors file; 0 for a broken one, which loading will report."""
    try:
        tensors = (entry for name, entry in safetensors_header(path).items() if name != "__metadata__")
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (ValueError, KeyError, TypeError):
        return 0
