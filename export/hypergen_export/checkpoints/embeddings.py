"""Textual inversions: the options `--embedding` and `--embedding-dir`, and those in LoRA files.

Reads no tensors and imports no torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hypergen_export.checkpoints.lora import BUNDLED, Lora, bundled_part
from hypergen_export.checkpoints.weights import safetensors_header, sha256
from hypergen_export.errors import BadEmbeddingError, BadLoraError, BadOptionError

# Any text that a prompt can contain as one word, and a list of names without quotes.
_NAME = re.compile(r"[^\s,]{1,64}")
_SUFFIXES = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A textual inversion and the word that stands for it in prompts."""

    name: str
    file: Path
    is_bundled: bool = False
    """Whether the file is a LoRA's, which has the vectors under the embedding's name."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        return sha256([self.file])

    def tokens(self, vectors: int) -> list[str]:
        """Its tokens, one for each vector, as diffusers names them."""
        return [self.name, *(f"{self.name}_{number}" for number in range(1, vectors))]


def read_embeddings(texts: Iterable[str], folder: Path | None, loras: Iterable[Lora] = ()) -> tuple[Embedding, ...]:
    """The embeddings that the options name: `[NAME=]PATH`, every file in the folder, and those in LoRAs' files.

    Raises BadOptionError, BadEmbeddingError, BadLoraError.
    """
    found = [_read(text) for text in texts]
    if folder is not None:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        in_folder = [Embedding(name=_name_of(file), file=file) for file in files if file.suffix in _SUFFIXES]
        if not in_folder:
            raise BadEmbeddingError(f"{folder}: no such folder, or no embeddings in it ({', '.join(_SUFFIXES)})")
        found += in_folder
    # A LoRA that is served at several scales is given several times.
    found += [each for file in {lora.file: lora for lora in loras}.values() for each in _bundled(file)]
    by_name: dict[str, Embedding] = {}
    for embedding in found:
        # Tokenizers of CLIP know no case.
        if by_name.setdefault(embedding.name.lower(), embedding) is not embedding:
            raise BadOptionError(f"--embedding: {embedding.name} is the name of two files; give one another name")
    return tuple(found)


def _bundled(lora: Lora) -> list[Embedding]:
    for name in lora.embeddings:
        if not _NAME.fullmatch(name):
            raise BadLoraError(f"{lora.file}: the name of its embedding must be one word, not {name[:80]!r}")
    return [Embedding(name=name, file=lora.file, is_bundled=True) for name in lora.embeddings]


def _read(text: str) -> Embedding:
    name, equals, rest = text.partition("=")
    if not equals or "/" in name or Path(text).expanduser().is_file():
        name, rest = "", text
    file = Path(rest).expanduser()
    if not file.is_file():
        raise BadEmbeddingError(f"{file}: no such embedding")
    if name and not _NAME.fullmatch(name):
        raise BadOptionError(f"--embedding: a name must be one word of 1 to 64 characters, not {name[:80]!r}")
    name = name or _name_of(file)
    return Embedding(name=name, file=file, is_bundled=_is_bundle(file, name))


def _is_bundle(file: Path, name: str) -> bool:
    """Whether the file is a LoRA's that has the embedding. One that cannot be read is refused with its vectors."""
    with contextlib.suppress(OSError, ValueError):
        return any(each.startswith(BUNDLED) and bundled_part(each)[0] == name for each in safetensors_header(file))
    return False


def _name_of(file: Path) -> str:
    """The file's name as one word."""
    return re.sub(r"[\s,]+", "-", file.stem)[:64]
