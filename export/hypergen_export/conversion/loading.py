"""Load a checkpoint's modules in torch, in float32, and check that all weights come from its files."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.errors import BrokenCheckpointError, first_line


def load_module(checkpoint: Checkpoint, component: Component) -> torch.nn.Module:
    """The torch module of `component`. Raises BrokenCheckpointError."""
    folder = checkpoint.folder / component.module
    weights = checkpoint.weights(component.module)
    library, name = component.loader.split(".")
    loader: Any = getattr(importlib.import_module(library), name)
    try:
        module, report = loader.from_pretrained(
            folder,
            variant=weights.variant or None,
            use_safetensors=weights.format == "safetensors",
            local_files_only=True,
            # Instead of the config's dtype, which would round more precise weights.
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, pickle, torch and both libraries raise their own errors
        raise BrokenCheckpointError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would use random numbers instead
        raise BrokenCheckpointError(f"{folder}: the weights lack {len(missing)} tensors, for example {missing[0]}")
    loaded: torch.nn.Module = module.float().eval().requires_grad_(False)
    broken = next((name for name, tensor in loaded.state_dict().items() if not tensor.isfinite().all()), None)
    if broken:  # every image would be black
        raise BrokenCheckpointError(f"{folder}: the weights are not finite ({broken})")
    return loaded
