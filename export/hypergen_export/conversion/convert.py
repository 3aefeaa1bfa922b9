"""Convert components one after the other: load, trace, write ONNX, compare with torch.

Importing this module imports torch, diffusers and transformers, so it is imported only to convert something.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.lora import Placement
from hypergen_export.checkpoints.weights import float32_bytes
from hypergen_export.conversion.cutting import cut
from hypergen_export.conversion.embeddings import extend
from hypergen_export.conversion.linking import WeightFiles, check_links
from hypergen_export.conversion.loading import load_module, load_placeholders
from hypergen_export.conversion.merging import merge_lora
from hypergen_export.conversion.onnx import Weights, capture, write_onnx
from hypergen_export.conversion.parity import Parity, compare_outputs, torch_outputs
from hypergen_export.conversion.pooling import Pooled, PoolScales, PoolWeights, add_pool
from hypergen_export.conversion.progress import Progress
from hypergen_export.conversion.sources import Placeholders, Source
from hypergen_export.conversion.wrappers import wrap

# Size in float32 from which a module is compared by its kept layers alone.
_LARGE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Job:
    """A component to convert to the file `onnx` with weights of `dtype`.

    `placements` are the LoRAs in its pool; `finish` builds an engine of the file, which is served itself without one.
    """

    component: Component
    dtype: str
    onnx: Path
    placements: Sequence[Placement] = ()
    finish: Finish | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def pool(self) -> PoolWeights:
        """The files of the component's rank pool."""
        return PoolWeights(self.onnx.parent)

    def check_placements(self) -> None:
        """Raise BadLoraError for LoRAs that do not fit, before anything is converted."""
        tensors = self.pool.empty()
        for placement in self.placements:
            self.pool.place(placement, tensors)


# Called after a component with a progress callback, to build an engine of the ONNX file; returns the engine's parity if
# that is another than the file's.
Finish = Callable[[Job, Callable[[float], None]], Parity | None]


def convert(checkpoint: Checkpoint, jobs: Sequence[Job], progress: Progress) -> dict[str, Parity]:
    """Write each job's ONNX, compare it with torch and finish the job; returns each component's parity."""
    with _quiet():
        return {job.component.name: _convert(checkpoint, job, progress) for job in jobs}


def _convert(checkpoint: Checkpoint, job: Job, progress: Progress) -> Parity:
    component = job.component
    files = WeightFiles(job.onnx, casts=job.finish is not None)
    with progress.stage(f"{component.name}: load"):
        light = _load(checkpoint, job, creates_pool=True)
    with progress.stage(f"{component.name}: capture"):
        program = capture(component, light.wrapped, checkpoint.sizes)
    with progress.stage(f"{component.name}: convert"):
        write_onnx(component, program, job.onnx, light.weights(job, files))
    del program, light
    with progress.stage(f"{component.name}: compare"):
        parity = _compare(checkpoint, job, files)
        if component.pool:
            job.pool.fill(job.placements)
    if job.finish is None:
        return parity
    with progress.stage(f"{component.name}: build") as report:
        return job.finish(job, report) or parity


@dataclass(frozen=True)
class _Light:
    """A wrapped module whose large tensors are placeholders."""

    wrapped: torch.nn.Module
    placeholders: Placeholders

    def weights(self, job: Job, files: WeightFiles) -> Weights:
        """What the ONNX file refers to."""
        return Weights(self.placeholders, files, job.torch_dtype)


def _load(
    checkpoint: Checkpoint,
    job: Job,
    kept_layers: Mapping[str, Sequence[int]] | None = None,
    *,
    creates_pool: bool = False,
) -> _Light:
    """The component's module, cut to `kept_layers` if these are given."""
    component = job.component
    module, placeholders = load_placeholders(checkpoint, component)
    if component.pool and creates_pool:
        job.pool.create(component.module, module, component.pool, job.torch_dtype)
        job.check_placements()
    if component.lora:
        merge_lora(component.module, module, component.lora, placeholders)
    _embed(checkpoint, component, module)
    pool = _add_pool(module, job, placeholders.make)
    if kept_layers:
        cut(module, kept_layers)
    placeholders.cast(module, job.torch_dtype)
    return _Light(_wrap(component, module, pool), placeholders)


def _add_pool(module: torch.nn.Module, job: Job, tensor: Callable[[Source], torch.Tensor]) -> PoolScales | None:
    """Add the component's rank pool, if it has one, with tensors made of their sources."""
    if job.component.pool is None:
        return None
    sources = job.pool.sources()
    return add_pool(module, job.component.pool, lambda name: tensor(sources[name]))


def _wrap(component: Component, module: torch.nn.Module, pool: PoolScales | None) -> torch.nn.Module:
    wrapped = wrap(component, module)
    return Pooled(wrapped, pool) if pool else wrapped


def _compare(checkpoint: Checkpoint, job: Job, files: WeightFiles) -> Parity:
    """Compare the ONNX file with torch; of a large module, the layers that its component keeps for this.

    The other layers differ from these in their weights alone, whose places in the files are checked.
    """
    component, sizes = job.component, checkpoint.sizes
    check_links(job.onnx)
    weights = checkpoint.weights(component.module)
    if not component.kept_layers or float32_bytes(checkpoint.folder_of(component.module), weights) < _LARGE_BYTES:
        expected = torch_outputs(component, _load_all(checkpoint, job).float(), sizes)
        return compare_outputs(component, expected, sizes, job.onnx, job.dtype)
    light = _load(checkpoint, job, component.kept_layers)
    with tempfile.NamedTemporaryFile(dir=job.onnx.parent, prefix=f"{job.onnx.name}.", suffix=".cut") as file:
        path = Path(file.name)
        write_onnx(component, capture(component, light.wrapped, sizes), path, light.weights(job, files))
        light.placeholders.load(light.wrapped)
        expected = torch_outputs(component, light.wrapped.float(), sizes)
        _free(light.wrapped)  # the engine holds the weights once more
        return compare_outputs(component, expected, sizes, path, job.dtype)


def _embed(checkpoint: Checkpoint, component: Component, module: torch.nn.Module) -> None:
    if checkpoint.embeddings and component.module in checkpoint.text_encoders:
        extend(checkpoint, component.module, module)


def _free(module: torch.nn.Module) -> None:
    """Free the memory of the weights: traced programs refer to the parameters, too."""
    for parameter in module.parameters():
        parameter.data = torch.empty(0)


def _load_all(checkpoint: Checkpoint, job: Job) -> torch.nn.Module:
    """The wrapped module with all weights, loaded by its own library."""
    component = job.component
    module = load_module(checkpoint, component)
    if component.lora:
        merge_lora(component.module, module, component.lora)
    _embed(checkpoint, component, module)
    pool = _add_pool(module, job, lambda source: source.read().float())
    return _wrap(component, module.to(job.torch_dtype), pool)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' logs, warnings and progress bars; their errors are reported as ours."""
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
