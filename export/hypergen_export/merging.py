"""A LoRA into the weights of a module, by diffusers' own means; the module comes out built as it was before.

This needs peft, which nothing else does: import it only where there is something to merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from peft import PeftConfig
from safetensors.torch import load_file

from hypergen_export.checkpoint import Checkpoint
from hypergen_export.errors import BadLoraError
from hypergen_export.lora import PEFT_PREFIX, Lora

_ADAPTER = "lora"


@dataclass(frozen=True)
class _Weights:
    """What a file holds, in diffusers' words: low-rank weights by name, and how they are scaled, in one of two ways."""

    state: Mapping[str, torch.Tensor]
    alphas: Mapping[str, float] | None = None
    metadata: Mapping[str, Any] | None = None


def merge_lora(checkpoint: Checkpoint, name: str, module: torch.nn.Module, lora: Lora) -> None:
    """Add the LoRA's share for the checkpoint's module `name`, times its scale, to the module's weights.

    The same as `load_lora_weights` and `fuse_lora` of diffusers' pipeline. Raises BadLoraError.
    """
    pipeline = _pipeline(checkpoint)
    setattr(pipeline, name, module)
    try:
        weights = _read(checkpoint, lora, pipeline)
        _load(pipeline, name, module, weights)
    except Exception as error:  # diffusers, peft, transformers and torch have errors of their own
        raise BadLoraError(f"{lora.file}: does not fit this model's {name} ({_reason(error)})") from error
    _check_loaded(name, module, lora, weights)
    pipeline.fuse_lora(components=[name], lora_scale=lora.scale)
    pipeline.unload_lora_weights()


def _pipeline(checkpoint: Checkpoint) -> Any:
    """As much of diffusers' pipeline as has to do with LoRAs, without any module."""
    is_xl = len(checkpoint.family.text_encoders) > 1
    return StableDiffusionXLLoraLoaderMixin() if is_xl else StableDiffusionLoraLoaderMixin()


def _read(checkpoint: Checkpoint, lora: Lora, pipeline: Any) -> _Weights:
    if lora.is_of_peft_alone:
        state = {f"unet.{name.removeprefix(PEFT_PREFIX)}": weight for name, weight in load_file(lora.file).items()}
        config = PeftConfig.from_pretrained(str(lora.file.parent)).to_dict()
        return _Weights(state, metadata={f"unet.{key}": value for key, value in config.items()})
    # kohya's trainer for XL numbers the UNet's blocks otherwise; diffusers reads from its config how.
    is_xl = isinstance(pipeline, StableDiffusionXLLoraLoaderMixin)
    config = SimpleNamespace(**{"layers_per_block": 2, **checkpoint.config("unet")}) if is_xl else None
    return _Weights(*pipeline.lora_state_dict(str(lora.file), unet_config=config, return_lora_metadata=True))


def _load(pipeline: Any, name: str, module: torch.nn.Module, weights: _Weights) -> None:
    given = {"network_alphas": weights.alphas, "metadata": weights.metadata, "adapter_name": _ADAPTER}
    if name == "unet":
        pipeline.load_lora_into_unet(dict(weights.state), unet=module, **given)
    else:
        pipeline.load_lora_into_text_encoder(dict(weights.state), text_encoder=module, prefix=name, **given)


def _check_loaded(name: str, module: torch.nn.Module, lora: Lora, weights: _Weights) -> None:
    """Diffusers goes on without the weights that it finds no place for; the pictures would be of another LoRA."""
    expected = sum(key.startswith(f"{name}.") for key in weights.state)
    loaded = sum(".lora_" in key for key in module.state_dict())
    if loaded != expected:
        raise BadLoraError(
            f"{lora.file}: does not fit this model's {name} ({expected} weights are for it, it has places for {loaded})"
        )


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    if "size mismatch" in words or "ignore_mismatched_sizes" in words:  # torch's words, and transformers'
        return "the weights' shapes differ"
    if "not found in the base model" in words or isinstance(error, IndexError):  # where none of them is
        return "it has no layer that the weights are for"
    return words[:200]
