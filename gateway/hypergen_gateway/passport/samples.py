"""Images and final latents of a served model, generated one after another and kept, so that work can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click
import numpy as np

from hypergen_gateway.generation.backend import Backend, GeneratedImage, GenerationRequest, Latents, Pixels
from hypergen_gateway.observability.logs import console

Connect = Callable[[], AbstractAsyncContextManager[Backend]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image, its final latents (None from a sampler that does not send them), and the seconds that it took."""

    pixels: Pixels
    latents: Latents | None
    seconds: float


class SampleStore:
    """Samples of one export in a folder: kept across interruptions, and for other exports' passports.

    `key` is the export's. Without one nothing is kept.
    """

    def __init__(self, folder: Path, key: str) -> None:
        # Other versions may compute other images from the same files.
        versions = [_version(name) for name in ("hypergen-triton", "openvino")]
        self._folder = folder / _digest([key, *versions]) if key else None
        self._kept: dict[str, Sample] = {}

    def find(self, request: GenerationRequest) -> Sample | None:
        """The sample of a request, if it is there."""
        name = _digest(asdict(request))
        if name not in self._kept and self._folder is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, BadZipFile):
                self._kept[name] = _read(self._folder / name)
        return self._kept.get(name)

    def keep(self, request: GenerationRequest, sample: Sample) -> None:
        """Keep a sample; in memory alone if the folder cannot be written."""
        name = _digest(asdict(request))
        self._kept[name] = sample
        if self._folder is None:
            return
        arrays: dict[str, Any] = {"pixels": sample.pixels, "seconds": np.float64(sample.seconds)}
        if sample.latents is not None:
            arrays["latents"] = sample.latents
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as new:
                np.savez_compressed(new, **arrays)
            os.replace(new.name, self._folder / name)  # noqa: PTH105

    def clear(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read(file: Path) -> Sample:
    with file.open("rb") as opened, np.load(opened) as arrays:
        latents = arrays["latents"] if "latents" in arrays.files else None
        return Sample(pixels=arrays["pixels"], latents=latents, seconds=float(arrays["seconds"]))


async def sample_all(
    connect: Connect, requests: Sequence[GenerationRequest], store: SampleStore, label: str
) -> list[Sample]:
    """The sample of each request. Triton is started only if some are missing, and for no longer.

    Raises:
        HyperGenError: the model refuses a request, or is gone.
    """
    missing = [request for request in requests if store.find(request) is None]
    if missing:
        kept = f" ({len(requests) - len(missing)} are there already)" if len(missing) < len(requests) else ""
        console.info("Generating %d images, %s%s …", len(missing), label, kept)
        async with connect() as backend:
            with _progress(len(missing), label) as advance:
                for request in missing:
                    store.keep(request, await _sample(backend, request))
                    advance(request)
    return [sample for request in requests if (sample := store.find(request))]


async def _sample(backend: Backend, request: GenerationRequest) -> Sample:
    async with aclosing(backend.generate(request)) as images:
        image = await anext(images)
    return Sample(pixels=image.pixels, latents=image.latents, seconds=_seconds(image))


def _seconds(image: GeneratedImage) -> float:
    timings = image.timings
    return (timings.encode_text + timings.denoise + timings.decode) / 1000


@contextlib.contextmanager
def _progress(count: int, label: str) -> Iterator[Callable[[GenerationRequest], None]]:
    """A bar on a terminal; a line per image in a log."""
    if sys.stderr.isatty():
        with click.progressbar(length=count, label=label, file=sys.stderr, show_pos=True) as bar:
            yield lambda _: bar.update(1)
        return
    done = 0

    def report(request: GenerationRequest) -> None:
        nonlocal done
        done += 1
        console.info("%s: %d of %d, %.60s", label, done, count, request.prompt)

    yield report


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
