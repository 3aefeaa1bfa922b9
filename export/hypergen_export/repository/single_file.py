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

from hypergen_export.checkpoints.defaults import few_steps_word
from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.errors import OutputRefusedError, UnsupportedModelError
from hypergen_export.repository.staging import check_space, staged
from hypergen_export.single_files.kinds import ClipEncoder, TextEncoder

Notify = Callable[[str], None]
Report = Callable[[float], None]
# Writes to a folder, and returns what is recorded beside it.
Convert = Callable[[Path, Report], dict[str, Any]]
_RECORD = "single_file.json"
_FORMATS = (".safetensors", ".ckpt", ".gguf")
_UNREAD = {
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


@dataclass(frozen=True, kw_only=True)
class SingleFileFolder:
    """A converted file: its folder, the modules that it lacks, and what its kind says about its VAE and text encoders.

    `context_width`: how many features of all text encoders its UNet reads.
    """

    folder: Path
    missing: tuple[str, ...]
    vae: Mapping[str, Any]
    text_encoders: tuple[ClipEncoder, ...]
    context_width: int


def is_single_file(model: str) -> bool:
    """Whether `model` is a checkpoint in one file. Raises UnsupportedModelError for a format that is not read."""
    path = Path(model).expanduser()
    if not path.is_file():
        return False
    if path.suffix in _UNREAD:
        raise UnsupportedModelError(f"{model}: {_UNREAD[path.suffix]}")
    return path.suffix in _FORMATS


def convert_once(model: str, options: SingleFileOptions, notify: Notify) -> SingleFileFolder:
    """The folder of a single file, converted unless it was before. Raises ExportError."""
    path = Path(model).expanduser()
    said = path.with_suffix(".yaml").read_bytes() if path.with_suffix(".yaml").is_file() else b""

    def convert(folder: Path, report: Report) -> dict[str, Any]:
        from hypergen_export.single_files.folder import convert_single_file

        return asdict(convert_single_file(path, folder, options.prediction_type, report))

    # The name decides the schedule of few-step models; which names do may change with a release.
    said_by_name = few_steps_word(path.stem)
    output = _once(path, (options.prediction_type, said, said_by_name), convert, options, notify)
    record = _read(output)
    for text in (f"a {record['base']} model", *record["notices"]):
        notify(text)
    return SingleFileFolder(
        folder=output,
        missing=tuple(record["missing"]),
        vae=record["vae"],
        text_encoders=tuple(ClipEncoder(**each) for each in record["text_encoders"]),
        context_width=record["context_width"],
    )


def convert_vae_once(file: str, own: Mapping[str, Any], options: SingleFileOptions, notify: Notify) -> Path:
    """The folder of a VAE in one file; `own` are entries of the replaced VAE's config, which weights do not say."""
    path = Path(file).expanduser()

    def convert(folder: Path, report: Report) -> dict[str, Any]:
        from hypergen_export.single_files.vae import convert_vae

        convert_vae(path, folder, own, report)
        return {}

    return _once(path, ("vae", sorted(own.items())), convert, options, notify)


def convert_transformer_once(model: str, base: Mapping[str, Any], options: SingleFileOptions, notify: Notify) -> Path:
    """The folder of a transformer in one file; `base` is the config of its pipeline's own. Raises ExportError."""
    path = Path(model).expanduser()

    def convert(folder: Path, report: Report) -> dict[str, Any]:
        from hypergen_export.single_files.transformer import convert_transformer

        return {"notices": convert_transformer(path, folder, base, report)}

    output = _once(path, ("transformer", json.dumps(base, sort_keys=True)), convert, options, notify)
    for text in _read(output)["notices"]:
        notify(text)
    return output


def convert_text_encoder_once(
    path: Path, encoders: Mapping[str, TextEncoder], options: SingleFileOptions, notify: Notify
) -> tuple[str, Path]:
    """Which of the model's text encoders is in the file, and its folder. Raises ExportError."""

    def convert(folder: Path, report: Report) -> dict[str, Any]:
        from hypergen_export.single_files.text_encoder import convert_text_encoder

        return asdict(convert_text_encoder(path, folder, encoders, report))

    stated = {module: asdict(encoder) for module, encoder in encoders.items()}
    output = _once(path, ("text encoder", json.dumps(stated, sort_keys=True)), convert, options, notify)
    record = _read(output)
    for text in (f"{record['module']} is that of {path.name}", *record["notices"]):
        notify(text)
    return record["module"], output


def _once(path: Path, said: Any, convert: Convert, options: SingleFileOptions, notify: Notify) -> Path:
    """The folder that `convert` writes, under a key of the file's content and of what is said about it."""
    hashes = ContentHashes(_known_hashes(options.folder))
    _hash(hashes, path)
    output = options.folder / f"{path.stem[:60]}-{_key(path, hashes, said)}"
    with _locked(output, notify):
        if not (output / _RECORD).is_file():
            _convert(path, output, hashes, convert)
        elif hashes.has_new_hashes:
            # A file that was hashed just after it was written is hashed again, until its times can be relied on.
            _write_record(output, {**_read(output), "hashes": hashes.stored})
    return output


def _hash(hashes: ContentHashes, path: Path) -> None:
    from hypergen_export.conversion.progress import Progress

    unknown = hashes.unknown([path])
    if unknown:
        with contextlib.closing(Progress(1)) as progress, progress.stage(f"{path.name}: hash") as report:
            hashes.read(unknown, report)


def _convert(path: Path, output: Path, hashes: ContentHashes, convert: Convert) -> None:
    from hypergen_export.conversion.progress import Progress
    from hypergen_export.single_files.folder import named
    from hypergen_export.single_files.quantized import bytes_to_write

    with named(path):
        check_space(output, bytes_to_write(path))
    with (
        staged(output) as folder,
        contextlib.closing(Progress(1)) as progress,
        progress.stage(f"{path.name}: convert to diffusers' layout") as report,
    ):
        record = {**convert(folder, report), "file": path.name, "sha256": hashes(path), "hashes": hashes.stored}
        _write_record(folder, record)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    new = folder / f".{_RECORD}"
    new.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(folder / _RECORD)


def _key(path: Path, hashes: ContentHashes, said: Any) -> str:
    """Changes with the content, what is said about it, and the code that converts it."""
    digest = hashlib.sha256(repr((hashes(path), path.stem, said, version("diffusers"))).encode())
    for file in sorted(file for file in _ROOM.rglob("*") if file.suffix in (".py", ".gz")):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _known_hashes(folder: Path) -> dict[str, str]:
    """The hashes of large files that finished conversions have stored."""
    known: dict[str, str] = {}
    for file in folder.glob(f"[!.]*/{_RECORD}"):
        with contextlib.suppress(OutputRefusedError):
            known |= _read(file.parent).get("hashes", {})
    return known


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
