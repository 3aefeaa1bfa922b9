"""diffusers' and transformers' configs of modules, read from the shapes of a single file's tensors.

Raises KeyError with a tensor's name where one is missing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from hypergen_export.errors import UnsupportedModelError
from hypergen_export.single_files.kinds import UNET, ClipEncoder, Kind, Shapes

Config = dict[str, Any]
# In all of these models, of every kind.
_HEAD_WIDTH = 64
_HEADS_OF_1 = 8
_DEPTH_WITHOUT_ATTENTION = 1
_VAE_FACTOR = 8
_LEVELS = re.compile(r"^((text_model|language_model|model)\.)+")
CLIP_EMBEDDINGS = "embeddings.token_embedding.weight"


def unet_config(kind: Kind, shapes: Shapes) -> Config:
    """The config of a UNet2DConditionModel. Raises UnsupportedModelError for a layout that diffusers does not have."""
    unet = _within(UNET, shapes)
    down, up = _down_levels(unet), _up_levels(unet)
    widths = [unet[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in down]
    depths = [[_depth(unet, f"input_blocks.{block}.1") for block in level] for level in down]
    reversed_depths = [[_depth(unet, f"output_blocks.{block}.1") for block in level] for level in up]
    middle = _depth(unet, "middle_block.1")
    is_linear = any(len(shape) == 2 for name, shape in unet.items() if name.endswith("1.proj_in.weight"))
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [width // _HEAD_WIDTH for width in widths] if is_linear else _HEADS_OF_1,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": next(shape[1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight")),
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet["input_blocks.0.0.weight"][1],
        "layers_per_block": _layers_per_block(down, up),
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": unet["out.2.weight"][0],
        "sample_size": kind.side // _VAE_FACTOR,
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in reversed_depths],
        "use_linear_projection": is_linear,
        **_depths(depths, middle, reversed_depths),
        **_size_conditioning(unet, shapes),
    }


def vae_config(own: Mapping[str, Any], shapes: Shapes) -> Config:
    """The config of an AutoencoderKL; `shapes` by the names of latent diffusion, without a prefix.

    `own` are the entries that weights do not say, such as `scaling_factor`.
    """
    levels = _count(r"encoder\.down\.(\d+)\.", shapes)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shapes[f"encoder.down.{each}.block.0.conv1.weight"][0] for each in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": _count(r"encoder\.down\.0\.block\.(\d+)\.", shapes),
        "norm_num_groups": 32,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        **own,
    }


def bare_name(name: str) -> str:
    """The tensor's name within its model: releases of transformers differ in the levels around it, and read all."""
    return _LEVELS.sub("", name)


def clip_config(encoder: ClipEncoder, shapes: Shapes) -> Config:
    """The config of a CLIP text encoder; `shapes` by the bare names of transformers."""
    vocabulary, width = shapes[CLIP_EMBEDDINGS]
    layers = _count(r"encoder\.layers\.(\d+)\.", shapes)
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": [clip_loader(encoder).partition(".")[2]],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        # As the published configs have it: transformers then takes the token with the highest id, the end token.
        "eos_token_id": 2,
        "hidden_act": "gelu" if encoder.is_open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "model_type": "clip_text_model",
        "num_attention_heads": width // _HEAD_WIDTH,
        "num_hidden_layers": min(layers, encoder.layers or layers),
        "pad_token_id": 1,
        "projection_dim": projection[0] if projection else width,
        "vocab_size": vocabulary,
    }


def clip_loader(encoder: ClipEncoder) -> str:
    """The class of a CLIP text encoder."""
    return f"transformers.CLIPTextModel{'WithProjection' if encoder.has_projection else ''}"


def _within(prefix: str, shapes: Shapes) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _count(pattern: str, shapes: Shapes) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, shapes) if match})


def _depth(unet: Shapes, place: str) -> int:
    """Transformer blocks at a place; 0 if there is no attention."""
    return _count(rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.", unet)


def _down_levels(unet: Shapes) -> list[list[int]]:
    """The numbers of each level's blocks; a block that only halves the resolution ends a level."""
    blocks = range(1, _count(r"input_blocks\.(\d+)\.", unet))
    levels = itertools.groupby(blocks, lambda block: f"input_blocks.{block}.0.op.weight" in unet)
    return [list(level) for is_end, level in levels if not is_end]


def _up_levels(unet: Shapes) -> list[list[int]]:
    """The numbers of each level's blocks; a block that also doubles the resolution ends a level."""
    levels: list[list[int]] = [[]]
    for block in range(_count(r"output_blocks\.(\d+)\.", unet)):
        levels[-1].append(block)
        if any(f"output_blocks.{block}.{part}.conv.weight" in unet for part in (1, 2)):
            levels.append([])
    return levels


def _layers_per_block(down: list[list[int]], up: list[list[int]]) -> int:
    counts = {len(level) for level in down} | {len(level) - 1 for level in up}
    if len(counts) != 1 or len(down) != len(up):
        raise UnsupportedModelError("its UNet has levels of unequal numbers of layers, which is not supported")
    return counts.pop()


def _depths(down: list[list[int]], middle: int, up: list[list[int]]) -> Config:
    """The transformer blocks of each level; pruned models such as SSD-1B have other ones on the way up."""
    if any(min(level) == 0 < max(level) for level in (*down, *up)):
        raise UnsupportedModelError("its UNet has attention in a part of a level only, which is not supported")
    stated, reverse = list(map(_level_depth, down)), list(map(_level_depth, up))
    without_attention = middle == 0
    if not without_attention and middle != _last(stated[-1]):
        raise UnsupportedModelError("its UNet's middle block has a depth of its own, which is not supported")
    depths: Config = {"transformer_layers_per_block": stated}
    if set(map(str, (*stated, *reverse))) == {"1"}:
        depths = {"transformer_layers_per_block": 1}
    elif reverse != stated[::-1]:
        depths["reverse_transformer_layers_per_block"] = reverse
    if without_attention:
        depths["mid_block_type"] = "UNetMidBlock2D"
    return depths


def _level_depth(level: list[int]) -> int | list[int]:
    if max(level) == 0:
        return _DEPTH_WITHOUT_ATTENTION
    return level[0] if len(set(level)) == 1 else level


def _last(depth: int | list[int]) -> int:
    return depth if isinstance(depth, int) else depth[-1]


def _size_conditioning(unet: Shapes, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The entries of XL: pooled prompt and six numbers beside the time."""
    embedding = unet.get("label_emb.0.0.weight")
    if embedding is None:
        return {}
    pooled = shapes.get("conditioner.embedders.1.model.text_projection")
    numbers = 256 if pooled is None else (embedding[1] - pooled[1]) // 6
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": numbers,
        "projection_class_embeddings_input_dim": embedding[1],
    }
