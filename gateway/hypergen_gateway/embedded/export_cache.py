"""Resolves MODEL to a Triton repository: an exported one, or the cached export of a checkpoint.

The exporter runs as a separate process, so that torch is not imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hypergen_gateway.concurrency import run_with_timeout
from hypergen_gateway.embedded.environment import child_environment
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.processes import dying_with_parent, module_command
from hypergen_gateway.observability.logs import console

SHIPPED_MODEL = "hypergen/emoji"
# Columns of the rank pool for a folder of LoRAs: four of the usual rank.
FOLDER_RANK = 64
# An exporter does not handle signals while it converts a large tensor.
_STOP_SECONDS = 10.0
_WAITING_SECONDS = 15.0


class ExportFailedError(Exception):
    """The export failed. The exporter has printed the reason on stderr; `exit_code` is its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the export failed with exit code {exit_code}")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Build options of the engines, and the cache folder."""

    dtype: str
    max_batch_size: int
    cache_dir: Path
    loras: tuple[str, ...] = ()  # [NAME=]PATH[:SCALE], which the exporter reads
    lora_rank: int = 0  # least columns for LoRAs, as given
    lora_dir: Path | None = None  # whose files are served as they come and go
    deep_cache: bool = False
    prediction_type: str | None = None
    vae: str | None = None
    preview_vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()  # [NAME=]PATH, likewise
    embedding_dir: Path | None = None

    @property
    def columns(self) -> int:
        """The least columns for LoRAs; 0 if those that `loras` need are enough."""
        return self.lora_rank or (FOLDER_RANK if self.lora_dir else 0)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """The exporter's options for the checkpoint's parts, as given."""
        given = [
            ("--prediction-type", self.prediction_type),
            ("--vae", self.vae),
            ("--preview-vae", self.preview_vae),
            *(("--text-encoder", each) for each in self.text_encoders),
        ]
        return [(name, value) for name, value in given if value]


def default_cache_dir() -> Path | None:
    """`hypergen` in the user's cache folder, as the XDG base directory specification places it.

    None for a user without a home folder, such as an unknown uid in a container.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the specification says to ignore relative ones
        return given / "hypergen"
    try:
        return Path.home() / ".cache" / "hypergen"
    except RuntimeError:
        return None


def find_write_error(folder: Path) -> str | None:
    """Create a folder; the operating system's reason why it cannot be written to, or None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def is_repository(model: str) -> bool:
    """Whether `model` is an exported repository."""
    return (Path(model) / "diffusion" / "config.pbtxt").is_file()


def repository_path(model: str, options: ExportOptions) -> Path:
    """The cached export of a checkpoint; it need not exist."""
    return options.cache_dir / _folder_name(model, options)


async def find_repository(model: str, options: ExportOptions) -> Path:
    """The repository to serve, exported first if necessary, with the exporter's progress on stderr.

    Raises:
        ExportFailedError: there is no export and creating one failed.
        EmbeddedError: the embedded Triton cannot serve the repository.
    """
    if is_repository(model):
        _reject_plans(Path(model))
        _check_exported_loras(Path(model), options)
        if options.parts:
            raise EmbeddedError(f"{model} is exported already: pass {options.parts[0][0]} to 'hypergen export'.")
        if options.embeddings or options.embedding_dir:
            raise EmbeddedError(
                f"{model} is exported already: pass --embedding to 'hypergen export' with the checkpoint."
            )
        if options.deep_cache and not (Path(model) / "unet_shallow").is_dir():
            raise EmbeddedError(f"{model} has no shallow UNet: pass --deep-cache to 'hypergen export'.")
        return Path(model)
    output = repository_path(model, options)
    # A finished export can be used from a read-only volume.
    if not output.exists() and (reason := find_write_error(options.cache_dir)):
        raise EmbeddedError(f"Models cannot be stored in {options.cache_dir} ({reason}): see --cache-dir.")
    async with _locked(output) as lock:
        _remove_damaged(output)
        await _export(model, options, output, lock)
    return output


def _check_exported_loras(repository: Path, options: ExportOptions) -> None:
    if options.lora_dir and not any(repository.glob("*/1/lora_pool.safetensors")):
        raise EmbeddedError(f"{repository} has no rank pool for LoRAs: pass --lora-rank to 'hypergen export'.")
    given = {"--lora": options.loras, "--lora-rank": options.lora_rank}
    for name in (name for name, value in given.items() if value):
        raise EmbeddedError(f"{repository} is exported already: pass {name} to 'hypergen export' with the checkpoint.")


def _reject_plans(repository: Path) -> None:
    if any(repository.glob("*/*/model.plan")):
        raise EmbeddedError(
            f"{repository} holds TensorRT engines, which the embedded Triton cannot run. Start Triton with TensorRT on "
            f"a GPU machine ('tritonserver --model-repository={repository}'), then serve with --triton-url HOST:8001."
        )


def _folder_name(model: str, options: ExportOptions) -> str:
    """A readable name, distinct for distinct checkpoints and LoRAs; the exporter reuses common components."""
    place = _place(model)
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name).strip("-.") or "model"
    loras = f"-lora-{_digest(*options.loras)}" if options.loras else ""
    given = [*options.embeddings, *([str(options.embedding_dir)] if options.embedding_dir else [])]
    loras += f"-embeddings-{_digest(*given)}" if given else ""
    loras += f"-rank-{options.columns}" if options.columns else ""
    deep_cache = "-deep-cache" if options.deep_cache else ""
    parts = f"-{_digest(*(f'{name}={_place(value)}' for name, value in options.parts))}" if options.parts else ""
    suffix = f"{parts}{deep_cache}{loras}"
    return f"{readable}-{_digest(place)}-openvino-{options.dtype}-b{options.max_batch_size}{suffix}"


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


@contextlib.asynccontextmanager
async def _locked(output: Path) -> AsyncIterator[int | None]:
    """Hold an exclusive lock on exporting to `output`; a second start waits for the first and reuses its export.

    Yields the lock's file descriptor, which an exporter inherits to hold the lock even if this process is killed.
    Yields None if the cache is not writable.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(output.with_name(f".{output.name}.lock"), os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError:
        yield None
        return
    try:
        await _acquire(lock, output)
        yield lock
    finally:
        os.close(lock)


async def _acquire(lock: int, output: Path) -> None:
    logged = -_WAITING_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - logged >= _WAITING_SECONDS:
                logged = time.monotonic()
                written = _written_megabytes(output)
                console.info(f"Another process is exporting to {output}: waiting for it ({written} MB so far) …")
            await asyncio.sleep(0.2)
        except OSError:  # a file system without locks
            return
        else:
            return


def _written_megabytes(output: Path) -> int:
    """Megabytes written so far by the running export to `output`."""
    size = 0
    for folder in output.parent.glob(f".{output.name}.*.partial"):
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):  # it may be moved into place meanwhile
                size += file.stat().st_size
    return size // 2**20


def _remove_damaged(output: Path) -> None:
    """Remove an earlier export that cannot be read, so that a new one can replace it.

    The exporter never overwrites files that are not its own, but a folder of this name in the cache is.
    """
    try:
        record = json.loads((output / "hypergen.json").read_bytes())
    except FileNotFoundError:
        is_damaged = output.is_dir() and any(output.iterdir())
    except (OSError, ValueError):
        is_damaged = True
    else:
        is_damaged = not (isinstance(record, dict) and "format" in record)
    if is_damaged:
        console.info(f"The export in {output} is damaged: exporting again.")
        shutil.rmtree(output, ignore_errors=True)


async def _export(model: str, options: ExportOptions, output: Path, lock: int | None) -> None:
    """Run the exporter, which itself checks whether `output` is up to date."""
    try:
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(*module_command("hypergen_export")),
            *(model, "--engine", "openvino", "--dtype", options.dtype),
            *("--max-batch-size", str(options.max_batch_size), "--output", str(output)),
            *(f"--lora={lora}" for lora in options.loras),
            *(f"--embedding={embedding}" for embedding in options.embeddings),
            *([f"--embedding-dir={options.embedding_dir}"] if options.embedding_dir else []),
            *([f"--lora-rank={options.columns}"] if options.columns else []),
            *(["--deep-cache"] if options.deep_cache else []),
            *("--cache-dir", str(options.cache_dir)),
            *(f"{name}={value}" for name, value in options.parts),
            env=child_environment(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started to wait for it
        raise EmbeddedError(f"The exporter cannot be started: {error}.") from error
    try:
        exit_code = await process.wait()
    finally:
        await _terminate(process)
    if exit_code != 0:
        raise ExportFailedError(exit_code)


async def _terminate(process: asyncio.subprocess.Process) -> None:
    """Stop the exporter, with time to remove its incomplete output."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await run_with_timeout(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        with contextlib.suppress(TimeoutError):
            await run_with_timeout(process.wait(), _STOP_SECONDS)
