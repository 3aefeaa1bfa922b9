"""Convert components one after the other: load, trace, write ONNX, compare with torch.

Importing this module imports torch, diffusers and transformers, so it is imported only to convert something.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.onnx import capture, write_onnx
from hypergen_export.conversion.parity import Parity, compare
from hypergen_export.conversion.progress import Progress
from hypergen_export.conversion.wrappers import wrap


@dataclass(frozen=True, kw_only=True)
class Job:
    """A component to convert to the file `onnx` with weights of `dtype`."""

    component: Component
    dtype: str
    onnx: Path


# Called after each component with a progress callback, to build an engine of the ONNX file.
Finish = Callable[[Job, Callable[[float], None]], None]


def convert(
    checkpoint: Checkpoint, jobs: Sequence[Job], progress: Progress, finish: Finish | None
) -> dict[str, Parity]:
    """Write each job's ONNX, compare it with torch and call `finish`; returns each component's parity."""
    with _quiet():
        return {job.component.name: _convert(checkpoint, job, progress, finish) for job in jobs}


def _convert(checkpoint: Checkpoint, job: Job, progress: Progress, finish: Finish | None) -> Parity:
    component = job.component
    with progress.stage(f"{component.name}: load"):
        module = _load(checkpoint, component).to(getattr(torch, job.dtype))
        wrapped = wrap(component, module)
    with progress.stage(f"{component.name}: capture"):
        program = capture(component, wrapped, checkpoint.sizes)
    with progress.stage(f"{component.name}: convert"):
        write_onnx(component, program, job.onnx)
    with progress.stage(f"{component.name}: compare"):
        parity = compare(component, wrapped.float(), checkpoint.sizes, job.onnx, job.dtype)
    if finish:
        del program, wrapped, module  # frees memory: the engine builder holds another copy of the weights
        with progress.stage(f"{component.name}: build") as report:
            finish(job, report)
    return parity


def _load(checkpoint: Checkpoint, component: Component) -> torch.nn.Module:
    module = load_module(checkpoint, component)
    if component.lora:
        from hypergen_export.conversion.merging import merge_lora

        merge_lora(component.module, module, component.lora)
    return module


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
