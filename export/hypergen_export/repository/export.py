"""Export a checkpoint to a Triton repository, reusing what previous exports have converted.

torch is not imported before the first conversion, so an export that is up to date takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import CALIBRATED
from hypergen_export.checkpoints.defaults import checkpoint_parameters, notices
from hypergen_export.engines.engine import (
    ENGINES,
    OPENVINO,
    check_dtype,
    check_family,
    check_lora_rank,
    choose_sizes,
)
from hypergen_export.engines.memory import Model
from hypergen_export.engines.tensorrt import Target, local_target
from hypergen_export.errors import BadEmbeddingError, BadLoraError, BadOptionError, requires_export_extra
from hypergen_export.repository.cache_key import weight_files
from hypergen_export.repository.estimate import table
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.staging import (
    PreviousExport,
    check_space,
    file_sizes,
    read_record,
    staged,
    update_record,
    write_record,
)
from hypergen_export.repository.task import ExportTask
from hypergen_export.repository.writing import write_repository

_VERSIONS = ("hypergen-triton", "torch", "diffusers", "transformers", "onnx", "openvino")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The converted and the reused components; both are empty if everything was up to date."""

    converted: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()


def export(
    request: ExportRequest,
    target: Target | None = None,
    notify: Callable[[str], None] = lambda _: None,
    examine: Callable[[Path], None] = lambda _: None,
) -> ExportResult:
    """Write the Triton repository at `request.output`, unless it is up to date. Raises ExportError.

    TensorRT plans are built for `target`, by default for this machine. `notify` is called with each notice about the
    checkpoint; `examine` with the complete repository before it is put in place, which it prevents by an ExportError.
    """
    output = request.output.expanduser().resolve()
    task = _make_task(request, PreviousExport(output, read_record(output) or {}), target, notify)
    for text in notices(task.checkpoint):
        notify(text)
    _hash_weights(task)
    if task.is_up_to_date:
        # The same content may lie elsewhere now.
        made_of = {"model": request.model, "source": request.source}
        if task.hashes.has_new_hashes or not made_of.items() <= task.previous.record.items():
            update_record(output, {**task.previous.record, **made_of, "hashes": task.hashes.stored})
        examine(output)
        return ExportResult()
    if task.target is None and any(map(task.is_quantized, task.outdated)):
        with requires_export_extra():
            from hypergen_export.engines.quantization import require_nncf
        require_nncf(request.dtype)
    check_space(output, task.bytes_to_write)
    for text in _estimate(task):
        notify(text)
    with staged(output) as folder:
        parity = write_repository(task, folder)
        record = _record(task, folder, parity)
        write_record(folder, record)
        for name in (each.name for each in task.outdated if task.is_quantized(each)):
            error, limit = parity[name]["difference"], parity[name]["tolerance"]
            notify(f"{name} in {request.dtype} differs from float32 by {error:.2g} of its output (limit {limit:g})")
        examine(folder)
    # Linking the weights, here and in an export that was replaced, has changed their files' change times.
    if task.hashes.renew():
        update_record(output, {**(read_record(output) or record), "hashes": task.hashes.stored})
    reused = tuple(component.name for component in task.reused)
    return ExportResult(converted=tuple(component.name for component in task.outdated), reused=reused)


def _make_task(
    request: ExportRequest, previous: PreviousExport, target: Target | None, notify: Callable[[str], None]
) -> ExportTask:
    """The task of a request. Options are checked here, before any work is done, the cheapest check first."""
    engine = ENGINES[request.engine]
    check_dtype(engine, request.dtype)
    checkpoint = replace(open_request(request, notify), embeddings=request.embeddings)
    _check_embeddings(request, checkpoint)
    request = replace(request, loras=tuple(replace(lora, t5=checkpoint.family.t5) for lora in request.loras))
    _check_loras(request, checkpoint)
    if request.deep_cache and checkpoint.family.denoiser.module != "unet":
        raise BadOptionError(f"--deep-cache: only for models with a UNet, and {request.model} has a transformer")
    check_family(engine, request.dtype, checkpoint.family)
    check_lora_rank(request.dtype, request.lora_rank)
    if request.deep_cache and request.dtype in CALIBRATED:
        raise BadOptionError(
            f"--deep-cache: not with --dtype {request.dtype}; use it with bfloat16, or fewer steps with {request.dtype}"
        )
    sizes = choose_sizes(engine, request.sizes, checkpoint_parameters(checkpoint))
    if engine is OPENVINO:
        return ExportTask(checkpoint, request, previous, sizes, None)
    target = target or local_target()
    target.check_dtype(request.dtype)
    return ExportTask(checkpoint, request, previous, sizes, target)


def _check_embeddings(request: ExportRequest, checkpoint: Checkpoint) -> None:
    if not request.embeddings or max(text.max_chunks for text in checkpoint.family.text) > 1:
        return
    for embedding in request.embeddings:
        if embedding.is_bundled:
            raise BadEmbeddingError(
                f"{embedding.file}: teaches the word {embedding.name}, but only models with CLIP alone learn words, "
                f"and {request.model} has another text encoder"
            )
    raise BadOptionError(f"--embedding: only for models with CLIP alone, and {request.model} has another text encoder")


def _check_loras(request: ExportRequest, checkpoint: Checkpoint) -> None:
    for lora in request.loras:
        unknown = sorted(lora.modules - checkpoint.family.modules.keys())
        if unknown:
            raise BadLoraError(f"{lora.file}: changes {unknown[0]}, which {request.model} does not have{lora.made_for}")


def _estimate(task: ExportTask) -> Iterator[str]:
    """The GPU memory of the engines that are going to be built, where the weights' files state it."""
    if task.target is None or any(task.checkpoint.weights(each.module).format != "safetensors" for each in task.own):
        return iter(())
    return table(Model(checkpoint=task.checkpoint, components=task.components, dtype=task.request.dtype), task.shapes)


def _hash_weights(task: ExportTask) -> None:
    """Hash the weights whose hashes no export has stored: many gigabytes, so with progress."""
    files = [file for module in task.checkpoint.family.modules for file in weight_files(task.checkpoint, module)]
    unknown = task.hashes.unknown(files)
    if unknown:
        with requires_export_extra():
            from hypergen_export.conversion.progress import Progress
        with contextlib.closing(Progress(1)) as progress, progress.stage("weights: hash") as report:
            task.hashes.read(unknown, report)


def _record(task: ExportTask, folder: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": task.key,
        "model": task.request.model,
        "source": task.request.source,
        **task.settings,
        "target": asdict(task.target) if task.target else None,
        "versions": _versions(),
        "components": {
            component.name: {
                "key": task.keys[component.name],
                "parity": parity.get(component.name) or task.recorded(component)["parity"],
                "weights": task.linked_weights(component, folder),
            }
            for component in task.components
        },
        "tokenizers": task.tokenizer_keys,
        "loras": [{"name": lora.name, "scale": lora.scale, "sha256": lora.sha256} for lora in task.request.loras],
        "hashes": task.hashes.stored,
        "files": file_sizes(folder),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
