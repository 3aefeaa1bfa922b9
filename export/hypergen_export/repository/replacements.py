"""Parts that replace the checkpoint's own, or that a single file lacks: `--vae` and `--text-encoder`."""

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
    if is_single_file(vae):
        folder = convert_vae_once(vae, {name: own[name] for name in _OWN if name in own}, options, notify)
    else:
        folder = _module_folder(vae)
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in _VAES:
        raise BadOptionError(f"--vae: {vae} is {kind or 'no VAE'}, but only {' and '.join(_VAES)} are supported")
    scale, expected = (each.get("scaling_factor") or _DEFAULT_SCALE for each in (config, own))
    if kind == "AutoencoderKL" and scale != expected:
        notify(f"its VAE is replaced by one with another scaling factor ({scale:g}, not {expected:g})")
    return Replacement(folder=folder, loader=f"diffusers.{kind}")


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


def _module_folder(vae: str) -> Path:
    folder = Path(vae).expanduser()
    if not folder.is_dir():
        if folder.exists() or vae.startswith((".", "/", "~")) or vae.count("/") != 1:
            raise BadOptionError(f"--vae: {vae}: no such folder, single file, or hub id of the form owner/name")
        folder = find_module_snapshot(vae)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
