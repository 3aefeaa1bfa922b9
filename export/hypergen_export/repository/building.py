"""Converts components, and builds their engines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypergen_export.checkpoints.components import INT8, Component
from hypergen_export.engines.engine import TENSORRT
from hypergen_export.engines.profiles import profiles
from hypergen_export.engines.tensorrt import Build, Target, build_plan, onnx_files, write_plan_record
from hypergen_export.errors import requires_export_extra
from hypergen_export.repository.layout import ONNX, version_folder
from hypergen_export.repository.task import ExportTask

if TYPE_CHECKING:
    from hypergen_export.conversion.convert import Finish, Job
    from hypergen_export.conversion.parity import Parity

_STAGES_PER_COMPONENT = 4  # and one more if a plan is built


def convert_outdated(task: ExportTask, folder: Path) -> dict[str, Any]:
    """Convert what no previous export has, into the repository at `folder`; returns each one's parity."""
    with requires_export_extra():
        from hypergen_export.conversion.convert import Job, convert
        from hypergen_export.conversion.progress import Progress

    jobs = [
        Job(
            component=component,
            dtype=task.weights_dtype(component),
            onnx=version_folder(folder, component) / ONNX,
            placements=task.placements,
            finish=_finish(task, component),
        )
        for component in task.outdated
    ]
    progress = Progress(sum(_STAGES_PER_COMPONENT + bool(job.finish) for job in jobs))
    with contextlib.closing(progress):
        parity = convert(task.checkpoint, jobs, progress)
    return {name: asdict(entry) for name, entry in parity.items()}


def _finish(task: ExportTask, component: Component) -> Finish | None:
    """How the engine of a component is built; None if its ONNX file is served."""
    if task.target:
        return functools.partial(_build_quantized if task.is_quantized(component) else _build, task, task.target)
    return functools.partial(_quantize, task) if task.is_quantized(component) else None


def _quantize(task: ExportTask, job: Job, report: Callable[[float], None]) -> Parity:
    """Replace a component's ONNX file with its quantised graph."""
    from hypergen_export.engines.calibration import denoiser_calls, example_calls
    from hypergen_export.engines.quantization import quantize

    component, dtype = job.component, task.request.dtype
    if dtype != INT8:
        return quantize(component, dtype, job.onnx, example_calls(component, task.checkpoint.sizes), report)
    # Generating the images takes about half of the time.
    calls = denoiser_calls(task.checkpoint, component, job.onnx, lambda share: report(share / 2))
    return quantize(component, dtype, job.onnx, calls, lambda share: report(0.5 + share / 2))


def _build_quantized(task: ExportTask, target: Target, job: Job, report: Callable[[float], None]) -> Parity:
    """Let a component's ONNX file state what is computed in eight bits, then replace it with its plan."""
    from hypergen_export.engines.accuracy import check_error
    from hypergen_export.engines.qdq import quantize_graph
    from hypergen_export.engines.ranges import measure_ranges

    component, dtype = job.component, task.request.dtype
    # Generating the images takes about half of the time.
    ranges = measure_ranges(task.checkpoint, component, dtype, lambda share: report(share / 2))
    parity = check_error(component, dtype, ranges.error)
    quantize_graph(component, job.onnx, dtype, ranges.magnitudes)
    _build(task, target, job, lambda share: report(0.5 + share / 2))
    return parity


def _build(task: ExportTask, target: Target, job: Job, report: Callable[[float], None]) -> None:
    """Replace a component's ONNX file with its plan and the plan's record."""
    build = Build(
        name=job.component.name,
        onnx=job.onnx,
        dtype=task.request.dtype if task.is_quantized(job.component) else job.dtype,
        plan=job.onnx.with_name(TENSORRT.file),
        profiles=profiles(job.component, task.shapes),
        target=target,
    )
    write_plan_record(build, build_plan(build, report))
    for file in onnx_files(job.onnx):
        file.unlink()
