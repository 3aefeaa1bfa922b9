"""A checkpoint's modules in torch, in float32, with every weight from the files: the gate for what loading raises."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.errors import BrokenCheckpointError, first_line


def load_module(checkpoint: Checkpoint, component: Component) -> torch.nn.Module:
    """The module that `component` is made of. Raises BrokenCheckpointError."""
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
            # Not what the config says: where the weights are more precise, that would round them.
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, pickle, torch and both libraries have errors of their own
        raise BrokenCheckpointError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise BrokenCheckpointError(f"{folder}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    loaded: torch.nn.Module = module.float().eval().requires_grad_(False)
    broken = next((name for name, tensor in loaded.state_dict().items() if not tensor.isfinite().all()), None)
    if broken:  # it would draw black pictures
        raise BrokenCheckpointError(f"{folder}: has non-finite weights ({broken})")
    return loaded
