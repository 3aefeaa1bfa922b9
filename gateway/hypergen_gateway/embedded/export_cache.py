"""Which Triton repository a MODEL means: one that is already exported, or the cached export of a checkpoint.

Knows the cache's layout and how to start the exporter as a process of its own, so that torch stays out of this one.
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
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hypergen_gateway.embedded.environment import child_environment
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.processes import die_with_parent
from hypergen_gateway.observability.logs import console

SHIPPED_MODEL = "hypergen/emoji"
# `python -m hypergen_export`, but for the current folder, in which Python would look for modules first: it may be the
# checkpoint. Python 3.10 has no option for that.
_EXPORTER = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "import runpy; runpy.run_module('hypergen_export', run_name='__main__', alter_sys=True)"
)
# An exporter in the middle of a large tensor hears no signal.
_STOP_SECONDS = 10.0
_WAITING_SECONDS = 15.0


class ExportFailedError(Exception):
    """The exporter has already said why on stderr; `exit_code` is its own."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the export failed with exit code {exit_code}")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the engines are built for, and where they are kept."""

    dtype: str
    max_batch_size: int
    cache_dir: Path
    loras: tuple[str, ...] = ()  # [NAME=]PATH[:SCALE], which the exporter reads
    deep_cache: bool = False


def default_cache_dir() -> Path | None:
    """`hypergen` in the user's cache folder, as the XDG base directory specification places it.

    None for a user without a home, such as the unknown uid of a container.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # others are to be ignored
        return given / "hypergen"
    try:
        return Path.home() / ".cache" / "hypergen"
    except RuntimeError:
        return None


def why_not_writable(folder: Path) -> str | None:
    """Makes a folder, and says in the system's words why nothing can be written into it, if so."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def is_repository(model: str) -> bool:
    """Whether it is exported already."""
    return (Path(model) / "diffusion" / "config.pbtxt").is_file()


async def find_repository(model: str, options: ExportOptions) -> Path:
    """The repository to serve, exported first if need be, with the exporter's progress on stderr.

    Raises:
        ExportFailedError: there is none and none could be made.
        EmbeddedError: it is for another Triton than the embedded one.
    """
    if is_repository(model):
        _refuse_plans(Path(model))
        if options.loras:
            raise EmbeddedError(f"{model} is exported already: give --lora to 'hypergen export', with the checkpoint.")
        if options.deep_cache and not (Path(model) / "unet_shallow").is_dir():
            raise EmbeddedError(f"{model} is exported already, without: give --deep-cache to 'hypergen export'.")
        return Path(model)
    output = options.cache_dir / _folder_name(model, options)
    # A finished export is used from a volume that is mounted read-only, too.
    if not output.exists() and (reason := why_not_writable(options.cache_dir)):
        raise EmbeddedError(f"Models cannot be kept in {options.cache_dir} ({reason}): see --cache-dir.")
    async with _locked(output) as lock:
        _remove_damaged(output)
        await _export(model, options, output, lock)
    return output


def _refuse_plans(repository: Path) -> None:
    if any(repository.glob("*/*/model.plan")):
        raise EmbeddedError(
            f"{repository} holds TensorRT engines, which the embedded Triton cannot run: start Triton with TensorRT on "
            f"a GPU machine ('tritonserver --model-repository={repository}'), then serve with --triton-url HOST:8001."
        )


def _folder_name(model: str, options: ExportOptions) -> str:
    """Readable, and distinct for distinct checkpoints and LoRAs; the exporter shares what they have in common."""
    place = str(Path(model).resolve()) if Path(model).exists() else model
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name).strip("-.") or "model"
    loras = f"-lora-{_digest(*options.loras)}" if options.loras else ""
    deep_cache = "-deep-cache" if options.deep_cache else ""
    return f"{readable}-{_digest(place)}-openvino-{options.dtype}-b{options.max_batch_size}{deep_cache}{loras}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


@contextlib.asynccontextmanager
async def _locked(output: Path) -> AsyncIterator[int | None]:
    """While it lasts, nobody else exports to `output`; a second start waits for the first, and finds its export.

    Yields the descriptor that holds the lock. An exporter that has it, too, holds it until it ends, even if this
    process is killed. None where the cache cannot be written, nor exported to.
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
    told = -_WAITING_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - told >= _WAITING_SECONDS:
                told = time.monotonic()
                console.info(f"Another process exports to {output}: waiting for it ({_written(output)} MB so far) …")
            await asyncio.sleep(0.2)
        except OSError:  # a file system without locks
            return
        else:
            return


def _written(output: Path) -> int:
    """Megabytes that an export to `output` under way has written."""
    size = 0
    for folder in output.parent.glob(f".{output.name}.*.partial"):
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):  # it may be moved into place meanwhile
                size += file.stat().st_size
    return size // 2**20


def _remove_damaged(output: Path) -> None:
    """Make room for a new export where an earlier one cannot be read.

    The exporter never overwrites what it did not write; but a folder of this name in the cache was written by it.
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
    """Run the exporter; it finds out itself whether `output` is up to date."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _EXPORTER, model, "--engine", "openvino", "--dtype", options.dtype),
            *("--max-batch-size", str(options.max_batch_size), "--output", str(output)),
            *(f"--lora={lora}" for lora in options.loras),
            *(["--deep-cache"] if options.deep_cache else []),
            env=child_environment(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except (OSError, RuntimeError) as error:  # the latter where no thread can be started that waits for it
        raise EmbeddedError(f"The exporter cannot be started: {error}.") from error
    try:
        exit_code = await process.wait()
    finally:
        await _end(process)
    if exit_code != 0:
        raise ExportFailedError(exit_code)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let it remove what it has begun, for a while."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
