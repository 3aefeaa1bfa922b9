"""Random LoRAs for the miniature checkpoints, created by peft and written in the format of each trainer.

They are untrained, but change images by far more than rounding does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.conversion.layer_names import has_matrix
from hypergen_export.conversion.loading import load_module

RANK = 4
# Linear layers and convolutions, of each kind of module; of a transformer, all that it has.
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
}
Weights = dict[str, torch.Tensor]


def lora_weights(checkpoint: Path, *modules: str, seed: int = 3) -> dict[str, Weights]:
    """Module -> low-rank weights by peft's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {module: _random(_load(checkpoint, module), module) for module in modules}


def save_by_diffusers(folder: Path, weights: dict[str, Weights], **config: Any) -> Path:
    """As `save_lora_weights` writes it; `config` are entries of peft's LoraConfig, for the file's metadata.

    Pipelines with a transformer write it alike.
    """
    pipeline: Any = StableDiffusionXLPipeline if "text_encoder_2" in weights else StableDiffusionPipeline
    if "transformer" in weights:
        pipeline = StableDiffusion3Pipeline
    layers = {f"{module}_lora_layers": layer for module, layer in weights.items()}
    metadata = {f"{module}_lora_adapter_metadata": config for module in weights} if config else {}
    pipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def save_by_kohya(file: Path, weights: dict[str, Weights], alpha: float) -> Path:
    """As kohya's trainer writes it: underscores for dots, and an alpha beside each pair."""
    first = "lora_te1_text_model_" if "text_encoder_2" in weights else "lora_te_text_model_"
    prefixes = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    renamed: Weights = {}
    for module, layers in weights.items():
        for name, tensor in layers.items():
            path, _, pair = name.removesuffix(".weight").rpartition(".")
            layer = prefixes[module] + path.replace(".", "_")
            renamed[f"{layer}.{pair.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}.weight"] = tensor
            renamed[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(renamed, file)
    return file


def save_by_ai_toolkit(file: Path, transformer: Weights) -> Path:
    """As AI-Toolkit writes what it trained, for ComfyUI."""
    save_file({f"diffusion_model.{name}": tensor for name, tensor in transformer.items()}, file)
    return file


def save_with_magnitudes(file: Path, checkpoint: Path, module: str) -> Path:
    """A DoRA: low-rank weights and a norm for each output, which no rank pool can hold."""
    stored: Weights = {}
    base = _load(checkpoint, module)
    for name, tensor in lora_weights(checkpoint, module)[module].items():
        stored[f"{module}.{name}"] = tensor
        path = name.partition(".lora_")[0]
        weight = base.get_submodule(path).weight.detach()
        stored[f"{module}.{path}.lora_magnitude_vector"] = 1.1 * torch.linalg.vector_norm(weight.flatten(1), dim=1)
    save_file(stored, file)
    return file


def save_by_peft(folder: Path, checkpoint: Path, alpha: int, **settings: Any) -> Path:
    """As peft's `save_pretrained` writes a UNet that was trained alone; `settings` are peft's."""
    usual: dict[str, Any] = {"target_modules": TARGETS["unet"], "init_lora_weights": False}
    config = LoraConfig(r=RANK, lora_alpha=alpha, **(usual | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        get_peft_model(_load(checkpoint, "unet"), config).save_pretrained(str(folder))
    return folder


def _load(checkpoint: Path, module: str) -> Any:
    opened = open_checkpoint(str(checkpoint))
    (component,) = (each for each in opened.family.components if each.name == module)
    return load_module(opened, component)


def _random(model: Any, module: str) -> Weights:
    targets = TARGETS.get(module) or [path for path, layer in model.named_modules() if has_matrix(layer)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, model, "random")
    weights: Weights = get_peft_model_state_dict(model, adapter_name="random")
    return weights
