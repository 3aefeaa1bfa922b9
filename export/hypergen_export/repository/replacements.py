"""Parts beside the checkpoint's own or in place of them: `--vae`, `--preview-vae` and `--text-encoder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import INDEX, Replacement, find_folder, read_json
from hypergen_export.checkpoints.hub import find_module_snapshot
from hypergen_export.errors import BadOptionError
from hypergen_export.repository.single_file import Notify, SingleFileOptions, convert_vae_once, is_single_file

_VAES = ("AutoencoderKL", "AutoencoderTiny")
# Entries of a VAE's config that its weights do not say.
_OWN = ("force_upcast", "scaling_factor", "shift_factor")
# AutoencoderKL's own, for configs of early diffusers, which leave it out.
_DEFAULT_SCALE = 0.18215
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


def text_replacements(text_encoder: str) -> dict[str, Replacement]:
    """The text encoders and tokenizers of a pipeline's folder or hub id. Raises ExportError."""
    if Path(text_encoder).is_file():
        raise BadOptionError(f"--text-encoder: {text_encoder} is a file; give a pipeline's folder with its tokenizers")
    folder = find_folder(text_encoder)
    found = dict(_text_parts(folder))
    if not found:
        raise BadOptionError(f"--text-encoder: {text_encoder} has no {INDEX} that lists a text_encoder and a tokenizer")
    return found


def _text_parts(folder: Path) -> Iterator[tuple[str, Replacement]]:
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    for part, loader in index.items():
        if part.startswith(_TEXT_PARTS) and isinstance(loader, list) and all(loader) and (folder / part).is_dir():
            yield part, Replacement(folder=folder / part, loader=".".join(loader))


def _module_folder(option: str, vae: str) -> Path:
    folder = Path(vae).expanduser()
    if not folder.is_dir():
        if folder.exists() or vae.startswith((".", "/", "~")) or vae.count("/") != 1:
            raise BadOptionError(f"{option}: {vae}: no such folder, single file, or hub id of the form owner/name")
        folder = find_module_snapshot(vae)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
