"""Text encoders in one file each, by the names of ComfyUI's: those of the published checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# Module's class -> the prefix of its tensors in a file.
_PREFIXES = {"CLIP": "text_model.", "Qwen3": "model.", "Qwen2.5-VL": "model."}


def text_encoder_tensors(folder: Path, module: str, kind: str) -> Tensors:
    """The tensors of a pipeline's text encoder, by the names of its file.

    `kind` is CLIP, T5, Qwen3 or Qwen2.5-VL.
    """
    (weights,) = (folder / module).glob("*.safetensors")
    tensors = load_file(weights)
    if kind == "T5":
        embeddings = next(each for name, each in tensors.items() if name in ("shared.weight", _T5_SECOND_NAME))
        return {
            **{name: each for name, each in tensors.items() if "block" in name or "norm" in name},
            "shared.weight": embeddings,
        }
    prefix = _PREFIXES[kind]
    named = {
        name if name.startswith((prefix, "text_projection", "lm_head", "visual.")) else f"{prefix}{name}": each
        for name, each in tensors.items()
    }
    if kind == "CLIP":
        # Files of CLIP have both, whether the pipeline's class reads them or not.
        width = named["text_model.final_layer_norm.weight"].shape[0]
        named = {"text_projection.weight": torch.eye(width), "logit_scale": torch.tensor(4.6), **named}
    return named


_T5_SECOND_NAME = "encoder.embed_tokens.weight"


def save_text_encoder_file(
    path: Path, folder: Path, module: str, kind: str, change: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> Path:
    """Write a pipeline's text encoder as a file of its own."""
    tensors = change(text_encoder_tensors(folder, module, kind))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def without_weights(folder: Path, place: Path) -> Path:
    """A copy of a pipeline's folder as it is without its weights: configs, schedule and tokenizers."""
    return Path(shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))
