"""Names of a module's layers in LoRA files: diffusers', transformers' and kohya's, flattened with underscores.

A name may stand for several layers, one after another, which are one in the original implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from hypergen_export.checkpoints.layer_paths import flat
from hypergen_export.conversion.transformer_names import Rows, original_names

# Flattened name in a file -> path of each layer that it stands for -> the rows of the file's layer that it has; empty
# if the name stands for it alone.
Names = Mapping[str, Mapping[str, Rows]]

# Alternative names of a layer's last part, from diffusers' former attention processors.
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}
# Names in the UNet's original implementation, which kohya uses for XL.
_ORIGINAL_PARTS = {
    ("resnets", "conv1"): "in_layers_2",
    ("resnets", "conv2"): "out_layers_3",
    ("resnets", "time_emb_proj"): "emb_layers_1",
    ("resnets", "conv_shortcut"): "skip_connection",
    ("downsamplers", "conv"): "op",
}
_OUTER = {
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}


def layer_names(module: torch.nn.Module) -> Names:
    """The names of every linear layer and convolution."""
    layers = {path: layer for path, layer in module.named_modules() if has_matrix(layer)}
    paths = {flat(path): path for path in layers}
    paths |= {other: path for name, path in paths.items() for other in _other_names(name)}
    paths |= {other: paths[name] for name, other in _original_unet_names(module, paths)}
    return {name: {path: []} for name, path in paths.items()} | original_names(module, layers)


def has_matrix(layer: torch.nn.Module) -> bool:
    """Whether LoRAs may change the layer. No trainer is known to change grouped convolutions, as Sana has."""
    return isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and getattr(layer, "groups", 1) == 1


def _other_names(path: str) -> Iterator[str]:
    for ending, other in _PROJECTIONS.items():
        if path.endswith(f"_{ending}"):
            yield path.removesuffix(ending) + other


def _original_unet_names(unet: Any, paths: Iterable[str]) -> list[tuple[str, str]]:
    """Paths of a UNet's layers and their names in the original implementation; empty for other modules."""
    if not hasattr(unet, "down_blocks"):
        return []
    blocks = dict(_original_blocks(unet))
    names = [(path, _OUTER[path]) for path in paths if path in _OUTER]
    for path in paths:
        for block, original in blocks.items():
            if path.startswith(f"{block}_"):
                part = path.removeprefix(f"{block}_")
                kind = block.split("_")[-2]
                names.append((path, f"{original}_{_ORIGINAL_PARTS.get((kind, part), part)}"))
    return names


def _original_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """A UNet's resnets, attentions and samplers by path, with their names in the original flat lists of blocks."""
    place = 1  # after conv_in
    for number, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield f"down_blocks_{number}_resnets_{layer}", f"input_blocks_{place}_0"
            yield f"down_blocks_{number}_attentions_{layer}", f"input_blocks_{place}_1"
            place += 1
        if block.downsamplers:
            yield f"down_blocks_{number}_downsamplers_0", f"input_blocks_{place}_0"
            place += 1
    yield from (("mid_block_resnets_0", "middle_block_0"), ("mid_block_attentions_0", "middle_block_1"))
    yield "mid_block_resnets_1", "middle_block_2"
    place = 0
    for number, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            yield f"up_blocks_{number}_resnets_{layer}", f"output_blocks_{place}_0"
            yield f"up_blocks_{number}_attentions_{layer}", f"output_blocks_{place}_1"
            place += 1
        if block.upsamplers:  # has the index of the last layer, which it follows
            behind = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks_{number}_upsamplers_0", f"output_blocks_{place - 1}_{behind}"
