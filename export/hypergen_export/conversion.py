"""Components through torch: load, capture, convert, compare, one after the other, and quietly.

This is the module behind which torch, diffusers and transformers lie; import it only when something is converted.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import transformers

from hypergen_export.checkpoint import Checkpoint
from hypergen_export.compare import Parity, compare
from hypergen_export.components import Component
from hypergen_export.loading import load_module
from hypergen_export.onnx import capture, write_onnx
from hypergen_export.progress import Progress
from hypergen_export.wrappers import wrap


def convert(
    checkpoint: Checkpoint, components: Sequence[Component], folders: dict[str, Path], progress: Progress
) -> dict[str, Parity]:
    """Write each component's ONNX to its folder and return how well it agrees with torch."""
    with _quiet():
        return {
            component.name: _convert(checkpoint, component, folders[component.name], progress)
            for component in components
        }


def _convert(checkpoint: Checkpoint, component: Component, path: Path, progress: Progress) -> Parity:
    with progress.stage(f"{component.name}: load"):
        wrapped = wrap(component, load_module(checkpoint, component))
    with progress.stage(f"{component.name}: capture"):
        program = capture(component, wrapped, checkpoint.sizes)
    with progress.stage(f"{component.name}: convert"):
        write_onnx(component, program, path)
    with progress.stage(f"{component.name}: compare"):
        return compare(component, wrapped, checkpoint.sizes, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks and bars to themselves: what matters of them comes back as our errors."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
