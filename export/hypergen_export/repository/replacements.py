"""Parts beside the checkpoint's own or in place of them: `--vae`, `--preview-vae` and `--text-encoder`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import INDEX, Replacement, find_folder, read_json
from hypergen_export.checkpoints.detection import check_text_encoder
from hypergen_export.checkpoints.hub import find_module_snapshot
from hypergen_export.checkpoints.weights import stored_tensors
from hypergen_export.errors import (
    BadOptionError,
    BrokenCheckpointError,
    NotADiffusersPipelineError,
    UnsupportedModelError,
    first_line,
)
from hypergen_export.repository.single_file import (
    Notify,
    SingleFileFolder,
    SingleFileOptions,
    convert_text_encoder_once,
    convert_vae_once,
    is_single_file,
)
from hypergen_export.single_files.configs import CLIP_EMBEDDINGS, bare_name, clip_config, clip_loader
from hypergen_export.single_files.kinds import TextEncoder

# The text encoders of a model that a file may be, by their modules.
EncodersFor = Callable[[Path], Mapping[str, TextEncoder]]
_VAES = ("AutoencoderKL", "AutoencoderTiny")
# Entries of a VAE's config that its weights do not say.
_OWN = ("force_upcast", "norm_num_groups", "scaling_factor", "shift_factor")
# AutoencoderKL's own, for configs of early diffusers, which leave it out.
_DEFAULT_SCALE = 0.18215
# Suffixes of files that people give; no folder or hub id of a pipeline ends so.
_FILES = (".safetensors", ".gguf", ".ckpt", ".bin", ".pt")
_TEXT_PARTS = ("text_encoder", "tokenizer")


def vae_replacement(vae: str, own: Mapping[str, Any], options: SingleFileOptions, notify: Notify) -> Replacement:
    """The VAE at `vae`: a folder or hub id of a VAE or a pipeline, or a single file.

    `own` is the config of the VAE that it replaces. Raises ExportError.
    """
    folder, config = _vae("--vae", vae, {name: own[name] for name in _OWN if name in own}, options, notify)
    kind = config.get("_class_name")
    if kind not in _VAES:
        raise BadOptionError(f"--vae: {vae} is {kind or 'no VAE'}, but only {' and '.join(_VAES)} are supported")
    scale, expected = (each.get("scaling_factor") or _DEFAULT_SCALE for each in (config, own))
    if kind == "AutoencoderKL" and scale != expected:
        notify(f"its VAE is replaced by one with another scaling factor ({scale:g}, not {expected:g})")
    return Replacement(folder=folder, loader=f"diffusers.{kind}")


def preview_vae(vae: str, options: SingleFileOptions, notify: Notify) -> Replacement:
    """The AutoencoderTiny at `vae`: a folder, hub id or single file. Raises ExportError."""
    folder, config = _vae("--preview-vae", vae, {}, options, notify)
    kind = config.get("_class_name")
    if kind != "AutoencoderTiny":
        raise BadOptionError(f"--preview-vae: {vae} is {kind or 'no VAE'}, but only AutoencoderTiny is supported")
    return Replacement(folder=folder, loader=f"diffusers.{kind}")


def _vae(
    option: str, vae: str, own: Mapping[str, Any], options: SingleFileOptions, notify: Notify
) -> tuple[Path, Mapping[str, Any]]:
    """A VAE's folder and config."""
    is_file = is_single_file(vae)
    folder = convert_vae_once(vae, own, options, notify) if is_file else _module_folder(option, vae)
    return folder, read_json(folder / "config.json")


def split_text_encoders(given: tuple[str, ...]) -> tuple[str | None, tuple[Path, ...]]:
    """The pipeline whose text encoders to use, if any, and the files of single ones. Raises BadOptionError."""
    files = tuple(path for path in (Path(each).expanduser() for each in given) if path.is_file())
    pipelines = [each for each in given if not Path(each).expanduser().is_file()]
    for each in pipelines:
        _check_is_there("--text-encoder", each)
    if len(pipelines) > 1:
        raise BadOptionError(
            f"--text-encoder: {pipelines[0]} and {pipelines[1]} are two pipelines; give one, and files"
        )
    for file in files:
        if file.suffix not in (".safetensors", ".gguf"):
            raise BadOptionError(f"--text-encoder: {file}: give a .safetensors or .gguf file, or a pipeline's folder")
    return (pipelines[0] if pipelines else None), files


def find_configs(pipeline: str) -> Path:
    """The folder of a pipeline that need not have its weights. Raises ExportError."""
    return find_folder(pipeline, lambda _: False)


def text_replacements(pipeline: str, files: Mapping[str, Replacement]) -> dict[str, Replacement]:
    """The text encoders and tokenizers of a pipeline's folder or hub id, with those in `files` in place of its own.

    Raises ExportError.
    """
    folder = find_folder(pipeline, lambda module: module.startswith(_TEXT_PARTS) and module not in files)
    found = dict(_text_parts(folder))
    if not found:
        raise BadOptionError(f"--text-encoder: {pipeline} has no {INDEX} that lists a text_encoder and a tokenizer")
    return {**found, **files}


def file_replacements(
    files: tuple[Path, ...], encoders_for: EncodersFor, options: SingleFileOptions, notify: Notify
) -> dict[str, Replacement]:
    """The text encoders in files, in place of the model's own; `encoders_for` says which a file may be.

    Raises ExportError.
    """
    replaced: dict[str, Replacement] = {}
    taken: dict[str, Path] = {}
    for file in files:
        encoders = encoders_for(file)
        module, folder = convert_text_encoder_once(file, encoders, options, notify)
        if module in taken:
            raise BadOptionError(f"--text-encoder: {taken[module]} and {file} are both the model's {module}")
        taken[module] = file
        replaced[module] = Replacement(folder=folder, loader=encoders[module].loader)
    return replaced


def encoders_of(folder: Path) -> Mapping[str, TextEncoder]:
    """The text encoders that a pipeline's folder lists, with the configs that it has. Raises ExportError."""
    parts = {part: each for part, each in _text_parts(folder) if part.startswith("text_encoder")}
    for part, each in parts.items():
        check_text_encoder(str(folder), part, each.loader)
    found = {part: TextEncoder(loader=each.loader, config=_text_config(each)) for part, each in parts.items()}
    if not found:
        raise NotADiffusersPipelineError(f"{folder}: has no {INDEX} that lists a text_encoder")
    return found


def _text_config(encoder: Replacement) -> Mapping[str, Any]:
    config = read_json(encoder.folder / "config.json")
    if not encoder.loader.startswith("transformers.CLIPText"):
        return config
    # The config of a complete CLIP model contains that of its text encoder.
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def clip_of(file: Path, converted: SingleFileFolder) -> Mapping[str, TextEncoder]:
    """The text encoder of a model with a UNet that a file can be: of two, the narrow or the wide one.

    Its config follows from the file's shapes.

    Raises:
        BrokenCheckpointError, NotADiffusersPipelineError, UnsupportedModelError
    """
    if file.suffix == ".gguf":
        raise UnsupportedModelError(f"{file}: models with a UNet have CLIP, which is read from .safetensors alone")
    try:
        shapes = {bare_name(name): tensor.shape for name, tensor in stored_tensors(file).items()}
        _, width = shapes[CLIP_EMBEDDINGS]
        is_second = len(converted.text_encoders) > 1 and width > converted.context_width / 2
        encoder = converted.text_encoders[int(is_second)]
        return {encoder.module: TextEncoder(loader=clip_loader(encoder), config=clip_config(encoder, shapes))}
    except KeyError as error:
        raise NotADiffusersPipelineError(
            f"{file}: it is no CLIP text encoder by transformers' names: it lacks {error.args[0]}"
        ) from error
    except (ValueError, TypeError, OSError) as error:
        raise BrokenCheckpointError(f"{file}: the weights cannot be read ({first_line(error)})") from error


def _text_parts(folder: Path) -> Iterator[tuple[str, Replacement]]:
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    for part, loader in index.items():
        if part.startswith(_TEXT_PARTS) and isinstance(loader, list) and all(loader) and (folder / part).is_dir():
            yield part, Replacement(folder=folder / part, loader=".".join(map(str, loader)))


def _check_is_there(option: str, given: str) -> None:
    path = Path(given).expanduser()
    if path.suffix in _FILES and not path.exists():
        raise BadOptionError(f"{option}: {given}: no such file")


def _module_folder(option: str, vae: str) -> Path:
    _check_is_there(option, vae)
    folder = Path(vae).expanduser()
    if not folder.is_dir():
        if folder.exists() or vae.startswith((".", "/", "~")) or vae.count("/") != 1:
            raise BadOptionError(f"{option}: {vae}: no such folder, single file, or hub id of the form owner/name")
        folder = find_module_snapshot(vae)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
