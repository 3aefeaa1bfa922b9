"""The checkpoint of a request: a folder, a hub id or a single file, with the parts that replace its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypergen_export.checkpoints.checkpoint import (
    Checkpoint,
    Replacement,
    check_pipeline,
    find_folder,
    open_checkpoint,
    read_json,
)
from hypergen_export.checkpoints.families.tensors import PREVIEW_DECODER
from hypergen_export.errors import BadOptionError, BrokenCheckpointError, requires_export_extra
from hypergen_export.repository.replacements import (
    clip_of,
    encoders_of,
    file_replacements,
    find_configs,
    preview_vae,
    split_text_encoders,
    text_replacements,
    vae_replacement,
)
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import convert_once, convert_transformer_once, is_single_file


def open_request(request: ExportRequest, notify: Callable[[str], None]) -> Checkpoint:
    """The checkpoint, converted from a single file if it is one, with the parts that replace its own.

    Raises ExportError.
    """
    if is_single_file(request.model):
        with requires_export_extra():
            return _open_single_file(request, notify)
    if request.single_files.prediction_type:
        raise BadOptionError("--prediction-type: only for single files; a folder's scheduler says it")
    return open_checkpoint(request.model, _replacements(request, notify))


def _open_single_file(request: ExportRequest, notify: Callable[[str], None]) -> Checkpoint:
    pipeline, files = split_text_encoders(request.text_encoders)
    if pipeline and (find_configs(pipeline) / "transformer" / "config.json").is_file():
        return _open_transformer(request, pipeline, files, notify)
    own = encoders_of(find_configs(pipeline)) if pipeline and files else None
    converted = convert_once(request.model, request.single_files, notify)
    replaced = file_replacements(files, lambda file: own or clip_of(file, converted), request.single_files, notify)
    if pipeline:
        replaced = text_replacements(pipeline, replaced)
    if request.vae:
        replaced["vae"] = vae_replacement(request.vae, converted.vae, request.single_files, notify)
    absent = [module for module in converted.missing if module not in replaced]
    if absent:
        option = "--vae" if absent == ["vae"] else "--text-encoder"
        raise BrokenCheckpointError(f"{request.model}: it has no {' and no '.join(absent)}: see {option}")
    return open_checkpoint(str(converted.folder), replaced | _preview_vae(request, notify))


def _open_transformer(
    request: ExportRequest, pipeline: str, files: tuple[Path, ...], notify: Callable[[str], None]
) -> Checkpoint:
    """A transformer's file with the rest of a pipeline, of which parts that are given as files need no weights."""
    if request.single_files.prediction_type:
        raise BadOptionError("--prediction-type: only for models with a UNet; a transformer's pipeline says it")
    base = find_configs(pipeline)
    check_pipeline(pipeline, base)
    replaced = file_replacements(files, lambda _: encoders_of(base), request.single_files, notify)
    replaced |= _vae(request, base, notify)
    config = read_json(base / "transformer" / "config.json")
    folder = convert_transformer_once(request.model, config, request.single_files, notify)
    replaced["transformer"] = Replacement(folder=folder, loader=f"diffusers.{config['_class_name']}")
    rest = find_folder(pipeline, lambda module: module not in replaced)
    return open_checkpoint(str(rest), replaced | _preview_vae(request, notify))


def _replacements(request: ExportRequest, notify: Callable[[str], None]) -> dict[str, Replacement]:
    """The parts of a folder or hub id that are replaced."""
    pipeline, files = split_text_encoders(request.text_encoders)
    replaced: dict[str, Replacement] = {}
    if files or request.vae:
        check_pipeline(request.model, find_configs(request.model))
    with requires_export_extra():
        if files:
            own = encoders_of(find_configs(pipeline or request.model))
            replaced = file_replacements(files, lambda _: own, request.single_files, notify)
        if pipeline:
            replaced = text_replacements(pipeline, replaced)
        if request.vae:
            replaced |= _vae(request, find_configs(request.model), notify)
    return replaced | _preview_vae(request, notify)


def _vae(request: ExportRequest, configs: Path, notify: Callable[[str], None]) -> dict[str, Replacement]:
    """The VAE that replaces that of the pipeline whose configurations are in `configs`."""
    if not request.vae:
        return {}
    own = read_json(configs / "vae" / "config.json")
    return {"vae": vae_replacement(request.vae, own, request.single_files, notify)}


def _preview_vae(request: ExportRequest, notify: Callable[[str], None]) -> dict[str, Replacement]:
    if not request.preview_vae:
        return {}
    with requires_export_extra():
        return {PREVIEW_DECODER.module: preview_vae(request.preview_vae, request.single_files, notify)}
