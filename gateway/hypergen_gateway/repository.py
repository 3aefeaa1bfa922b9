"""Which Triton repository a MODEL means: one that is already exported, or the cached export of a checkpoint.

Knows the cache's layout and how to start the exporter as a process of its own, so that torch stays out of this one.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from hypergen_gateway.embedded.errors import EmbeddedError

SHIPPED_MODEL = "hypergen/emoji"


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
    if reason := why_not_writable(options.cache_dir):
        raise EmbeddedError(f"Models cannot be kept in {options.cache_dir} ({reason}): see --cache-dir.")
    output = options.cache_dir / _folder_name(model, options)
    await _export(model, options, output)
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


async def _export(model: str, options: ExportOptions, output: Path) -> None:
    """Run the exporter; it finds out itself whether `output` is up to date."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hypergen_export", model, "--engine", "openvino", "--dtype", options.dtype),
        *("--max-batch-size", str(options.max_batch_size), "--output", str(output)),
        *(f"--lora={lora}" for lora in options.loras),
        *(["--deep-cache"] if options.deep_cache else []),
        start_new_session=True,
    )
    try:
        exit_code = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if exit_code != 0:
        raise ExportFailedError(exit_code)
