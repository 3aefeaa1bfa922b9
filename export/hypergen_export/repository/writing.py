"""Writes a repository, apart from its record."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.defaults import checkpoint_parameters
from hypergen_export.checkpoints.family import TextInput
from hypergen_export.checkpoints.files import link_or_copy
from hypergen_export.engines.engine import size_parameters
from hypergen_export.engines.profiles import reference_rows
from hypergen_export.errors import requires_export_extra
from hypergen_export.repository.building import convert_outdated
from hypergen_export.repository.layout import (
    SAMPLER,
    SCHEDULERS,
    sampler_folder,
    sampler_sources,
    tokenizer_file,
    version_folder,
)
from hypergen_export.repository.task import ExportTask

# Rows of a denoiser call that one image takes with skip-layer guidance.
_ROWS_SKIPPING_LAYERS = 3


def write_repository(task: ExportTask, folder: Path) -> dict[str, Any]:
    """Write everything but the record to `folder`; returns the parity of each converted component.

    Raises ExportError.
    """
    for component in task.components:
        version_folder(folder, component).mkdir(parents=True)
    (folder / SAMPLER / "1").mkdir(parents=True)
    for component in task.reused:
        for file in version_folder(task.sources[component.name].folder, component).iterdir():
            link_or_copy(file, version_folder(folder, component) / file.name)
    if task.target is None:
        _fill_pools(task, folder)
    for text in task.checkpoint.family.text:
        _write_tokenizer(task, text, folder)
    _write_configs(task, folder)
    for source in sampler_sources():
        copy = folder / SAMPLER / source.relative_to(sampler_folder())
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    return convert_outdated(task, folder) if task.outdated else {}


def _fill_pools(task: ExportTask, folder: Path) -> None:
    """Write the LoRAs' weights to the pools of reused components. Raises BadLoraError."""
    pooled = [component for component in task.reused if component.pool]
    if not pooled:
        return
    with requires_export_extra():
        from hypergen_export.conversion.pooling import PoolWeights

    for component in pooled:
        PoolWeights(version_folder(folder, component)).fill(task.placements)


def _write_tokenizer(task: ExportTask, text: TextInput, folder: Path) -> None:
    with requires_export_extra():
        from hypergen_export.conversion.tokenizer import write_tokenizer

        file = tokenizer_file(text.tokenizer)
        if task.has_tokenizer(text.tokenizer):
            link_or_copy(task.previous.folder / file, folder / file)
        else:
            write_tokenizer(task.checkpoint, text, folder / file)


def _write_configs(task: ExportTask, folder: Path) -> None:
    with requires_export_extra():
        from hypergen_export.conversion.tokenizer import text_parameters
        from hypergen_export.repository.config_pbtxt import EngineOptions, component_config, sampler_config

    request = task.request
    template = (sampler_folder() / "config.pbtxt").read_text(encoding="utf-8")
    tokenizers = {name: folder / tokenizer_file(name) for name in task.checkpoint.family.tokenizers}
    own = checkpoint_parameters(task.checkpoint) | text_parameters(task.checkpoint, tokenizers, task.pool)
    own |= _write_schedulers(task.checkpoint, int(own["default_num_inference_steps"]), folder)
    default_size = int(own["default_width"]), int(own["default_height"])
    options = EngineOptions(engine=request.engine, dtype=request.dtype, shapes=task.shapes, default_size=default_size)
    for component in task.components:
        text = component_config(component, options)
        (folder / component.name / "config.pbtxt").write_text(text, encoding="utf-8")
    if task.shapes.rows < _ROWS_SKIPPING_LAYERS:
        own |= dict.fromkeys(("default_skip_layer_guidance_scale", "max_skip_layer_guidance_scale"), "0")
    if task.pool:
        own["denoiser_inputs"] += f",{task.pool.scales.name}"
    own |= size_parameters(task.sizes, own) | {"max_reference_rows": str(reference_rows(task.shapes))}
    parameters = task.settings | own | _lora_parameters(task) | {"export_key": task.key}
    (folder / SAMPLER / "config.pbtxt").write_text(sampler_config(template, parameters), encoding="utf-8")


def _write_schedulers(checkpoint: Checkpoint, steps: int, folder: Path) -> dict[str, str]:
    """Write the sampler's table of schedulers; returns the parameters that describe it."""
    with requires_export_extra():
        from hypergen_export.checkpoints.schedulers import checkpoint_schedulers

    table = checkpoint_schedulers(checkpoint, steps)
    (folder / SAMPLER / SCHEDULERS).write_text(json.dumps(asdict(table), indent=1), encoding="utf-8")
    return {"schedulers": ",".join(table.names), "default_scheduler": table.own_name}


def _lora_parameters(task: ExportTask) -> dict[str, str]:
    """The sampler's parameters for LoRAs: columns of the rank pool or models, and the names of all component models."""
    pooled = [
        {
            "name": placement.lora.name,
            "scale": placement.lora.scale,
            "columns": placement.columns,
            "changes": sorted(placement.lora.modules),
        }
        for placement in task.placements
    ]
    merged = [
        {
            "name": lora.name,
            "scale": lora.scale,
            "models": {component: variant.name for component, variant in task.variants(lora).items()},
        }
        for lora in task.merged
    ]
    return {
        "loras": json.dumps(pooled + merged),
        "lora_rank": str(task.pool.rank if task.pool else 0),
        "components": ",".join(component.name for component in task.components),
    }
