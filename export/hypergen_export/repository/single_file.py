"""The diffusers folder of a single file: converted once into the cache, under a key of the file's content.

Every process that serves or exports the file shares the conversion, and its exports link the weights there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.errors import OutputRefusedError, UnsupportedModelError
from hypergen_export.repository.staging import check_space, staged

Notify = Callable[[str], None]
_RECORD = "single_file.json"
_FORMATS = (".safetensors", ".ckpt")
_UNREAD = {
    ".gguf": "GGUF is not read; take the model's .safetensors file",
    ".pt": "a pickle of any kind; rename it to .ckpt if it is a checkpoint, or take its .safetensors file",
}
_ROOM = Path(__file__).parents[1] / "single_files"


def default_cache_dir() -> Path:
    """`hypergen` in the user's cache folder (XDG), where `hypergen serve` has its own."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "hypergen"


@dataclass(frozen=True, kw_only=True)
class SingleFileOptions:
    """The cache in which conversions are kept, and what a file may not say about itself."""

    cache_dir: Path = field(default_factory=default_cache_dir)
    prediction_type: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of all conversions."""
        return self.cache_dir / "checkpoints"


def is_single_file(model: str) -> bool:
    """Whether `model` is a checkpoint in one file. Raises UnsupportedModelError for a format that is not read."""
    path = Path(model).expanduser()
    if not path.is_file():
        return False
    if path.suffix in _UNREAD:
        raise UnsupportedModelError(f"{model}: {_UNREAD[path.suffix]}")
    return path.suffix in _FORMATS


def convert_once(model: str, options: SingleFileOptions, notify: Notify) -> Path:
    """The folder of a single file, converted unless it was before. Raises ExportError."""
    path = Path(model).expanduser()
    hashes = ContentHashes(_known_hashes(options.folder))
    _hash(hashes, path)
    output = options.folder / f"{path.stem[:60]}-{_key(path, hashes, options)}"
    with _locked(output, notify):
        if not (output / _RECORD).is_file():
            _convert(path, output, hashes, options)
    record = _read(output)
    for text in (f"a {record['base']} model", *record["notices"]):
        notify(text)
    return output


def _hash(hashes: ContentHashes, path: Path) -> None:
    from hypergen_export.conversion.progress import Progress

    unknown = hashes.unknown([path])
    if unknown:
        with contextlib.closing(Progress(1)) as progress, progress.stage(f"{path.name}: hash") as report:
            hashes.read(unknown, report)


def _convert(path: Path, output: Path, hashes: ContentHashes, options: SingleFileOptions) -> None:
    from hypergen_export.conversion.progress import Progress
    from hypergen_export.single_files.folder import convert_single_file

    check_space(output, path.stat().st_size)
    with (
        staged(output) as folder,
        contextlib.closing(Progress(1)) as progress,
        progress.stage(f"{path.name}: convert to diffusers' layout") as report,
    ):
        converted = convert_single_file(path, folder, options.prediction_type, report)
        record = {"file": path.name, "sha256": hashes(path), "hashes": hashes.stored, **asdict(converted)}
        (folder / _RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(path: Path, hashes: ContentHashes, options: SingleFileOptions) -> str:
    """Changes with the content, what is said about it, and the code that converts it."""
    beside = path.with_suffix(".yaml")
    sources = sorted((file.name, file.read_bytes()) for file in _ROOM.rglob("*") if file.is_file())
    digest = hashlib.sha256(repr((hashes(path), path.stem, options.prediction_type, version("diffusers"))).encode())
    for name, content in (*sources, ("", beside.read_bytes() if beside.is_file() else b"")):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _known_hashes(folder: Path) -> dict[str, str]:
    """The hashes of large files that earlier conversions have stored."""
    return {
        stamp: known for file in folder.glob(f"*/{_RECORD}") for stamp, known in _read(file.parent)["hashes"].items()
    }


def _read(folder: Path) -> Mapping[str, Any]:
    try:
        record: Mapping[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputRefusedError(f"{folder}: the conversion is damaged; remove it to convert again") from error
    return record


@contextlib.contextmanager
def _locked(output: Path, notify: Notify) -> Iterator[None]:
    """Hold an exclusive lock on converting to `output`: a second process waits, and finds the conversion."""
    try:
        output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(output.with_name(f".{output.name}.lock"), os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError as error:
        if (output / _RECORD).is_file():  # a read-only cache with the conversion in it
            yield
            return
        raise OutputRefusedError(f"{output.parent}: cannot be written ({error.strerror}): see --cache-dir") from error
    try:
        _acquire(lock, output, notify)
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, output: Path, notify: Notify) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        notify(f"another process is converting to {output}: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return
