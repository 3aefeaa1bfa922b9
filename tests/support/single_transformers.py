"""Transformers by the names of the files that are distributed: diffusers' conversion reversed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_FLUX_BLOCKS = {
    r"^transformer_blocks\.(\d+)\.attn\.to_(q|k|v)\.": r"double_blocks.\1.img_attn.qkv[\2].",
    r"^transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj\.": r"double_blocks.\1.txt_attn.qkv[\2].",
    r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.to_out\.0\.": r"double_blocks.\1.img_attn.proj.",
    r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.": r"double_blocks.\1.txt_attn.proj.",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1[swapped].",
    r"^proj_out\.": "final_layer.linear.",
    r"^context_embedder\.": "txt_in.",
    r"^x_embedder\.": "img_in.",
}
_FLUX1 = {
    **_FLUX_BLOCKS,
    r"^time_text_embed\.timestep_embedder\.linear_1\.": "time_in.in_layer.",
    r"^time_text_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"^time_text_embed\.text_embedder\.linear_1\.": "vector_in.in_layer.",
    r"^time_text_embed\.text_embedder\.linear_2\.": "vector_in.out_layer.",
    r"^time_text_embed\.guidance_embedder\.linear_1\.": "guidance_in.in_layer.",
    r"^time_text_embed\.guidance_embedder\.linear_2\.": "guidance_in.out_layer.",
    r"^transformer_blocks\.(\d+)\.norm1\.linear\.": r"double_blocks.\1.img_mod.lin.",
    r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.": r"double_blocks.\1.txt_mod.lin.",
    r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"double_blocks.\1.img_mlp.0.",
    r"^transformer_blocks\.(\d+)\.ff\.net\.2\.": r"double_blocks.\1.img_mlp.2.",
    r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.": r"double_blocks.\1.txt_mlp.0.",
    r"^transformer_blocks\.(\d+)\.ff_context\.net\.2\.": r"double_blocks.\1.txt_mlp.2.",
    r"^single_transformer_blocks\.(\d+)\.norm\.linear\.": r"single_blocks.\1.modulation.lin.",
    r"^single_transformer_blocks\.(\d+)\.attn\.to_(q|k|v)\.": r"single_blocks.\1.linear1[\2].",
    r"^single_transformer_blocks\.(\d+)\.proj_mlp\.": r"single_blocks.\1.linear1[w].",
    r"^single_transformer_blocks\.(\d+)\.proj_out\.": r"single_blocks.\1.linear2.",
}
_CHROMA = {
    **_FLUX1,
    r"^distilled_guidance_layer\.layers\.(\d+)\.linear_1\.": r"distilled_guidance_layer.layers.\1.in_layer.",
    r"^distilled_guidance_layer\.layers\.(\d+)\.linear_2\.": r"distilled_guidance_layer.layers.\1.out_layer.",
    r"^distilled_guidance_layer\.norms\.(\d+)\.weight": r"distilled_guidance_layer.norms.\1.scale",
}
_FLUX2 = {
    **_FLUX_BLOCKS,
    r"^time_guidance_embed\.timestep_embedder\.linear_1\.": "time_in.in_layer.",
    r"^time_guidance_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"_modulation(_img|_txt|)\.linear\.": r"_modulation\1.lin.",
    r"^transformer_blocks\.(\d+)\.ff\.linear_in\.": r"double_blocks.\1.img_mlp.0.",
    r"^transformer_blocks\.(\d+)\.ff\.linear_out\.": r"double_blocks.\1.img_mlp.2.",
    r"^transformer_blocks\.(\d+)\.ff_context\.linear_in\.": r"double_blocks.\1.txt_mlp.0.",
    r"^transformer_blocks\.(\d+)\.ff_context\.linear_out\.": r"double_blocks.\1.txt_mlp.2.",
    r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.": r"single_blocks.\1.linear1.",
    r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.": r"single_blocks.\1.linear2.",
}
_SD3 = {
    r"^pos_embed\.pos_embed$": "pos_embed",
    r"^pos_embed\.proj\.": "x_embedder.proj.",
    r"^time_text_embed\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"^time_text_embed\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"^time_text_embed\.text_embedder\.linear_1\.": "y_embedder.mlp.0.",
    r"^time_text_embed\.text_embedder\.linear_2\.": "y_embedder.mlp.2.",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1[swapped].",
    r"^proj_out\.": "final_layer.linear.",
    r"^transformer_blocks\.(\d+)\.(attn2?)\.to_(q|k|v)\.": r"joint_blocks.\1.x_block.\2.qkv[\3].",
    r"^transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj\.": r"joint_blocks.\1.context_block.attn.qkv[\2].",
    r"^transformer_blocks\.(\d+)\.(attn2?)\.norm_(q|k)\.": r"joint_blocks.\1.x_block.\2.ln_\3.",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.": r"joint_blocks.\1.context_block.attn.ln_\2.",
    r"^transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0\.": r"joint_blocks.\1.x_block.\2.proj.",
    r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.": r"joint_blocks.\1.context_block.attn.proj.",
    r"^transformer_blocks\.(\d+)\.norm1\.linear\.": r"joint_blocks.\1.x_block.adaLN_modulation.1.",
    r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.": r"joint_blocks.\1.context_block.adaLN_modulation.1.",
    r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"joint_blocks.\1.x_block.mlp.fc1.",
    r"^transformer_blocks\.(\d+)\.ff\.net\.2\.": r"joint_blocks.\1.x_block.mlp.fc2.",
    r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.": r"joint_blocks.\1.context_block.mlp.fc1.",
    r"^transformer_blocks\.(\d+)\.ff_context\.net\.2\.": r"joint_blocks.\1.context_block.mlp.fc2.",
}
_Z_IMAGE = {
    r"\.attention\.to_(q|k|v)\.": r".attention.qkv[\1].",
    r"\.attention\.norm_(q|k)\.": r".attention.\1_norm.",
    r"\.attention\.to_out\.0\.": ".attention.out.",
    r"^all_final_layer\.2-1\.": "final_layer.",
    r"^all_x_embedder\.2-1\.": "x_embedder.",
}
# Family of tests/support/transformer_miniatures.py -> patterns of diffusers' names and what the file has instead.
NAMES: Mapping[str, Mapping[str, str]] = {
    "flux1-dev": _FLUX1,
    "flux1-schnell": _FLUX1,
    "chroma": _CHROMA,
    "flux2-klein": _FLUX2,
    "stable-diffusion-3": _SD3,
    "stable-diffusion-3-without-t5": _SD3,
    "z-image": _Z_IMAGE,
}


def save_transformer_file(path: Path, folder: Path, names: Mapping[str, str], prefix: str) -> Path:
    """Write the transformer of a folder by the names of its file."""
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    last = max((int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks.")), default=-1)
    parts: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        original = name
        for pattern, replacement in names.items():
            original = re.sub(pattern, replacement, original)
        if original.startswith(f"joint_blocks.{last}.context_block.adaLN"):  # its norm is another one in diffusers
            original = original.replace("modulation.1", "modulation.1[swapped]")
        whole, part = re.sub(r"\[\w+\]", "", original), re.search(r"\[(\w+)\]", original)
        parts.setdefault(whole, {})[part[1] if part else ""] = tensor
    joined = {f"{prefix}{name}": _join(given) for name, given in parts.items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in joined.items()}, path)
    return path


def _join(parts: Tensors) -> torch.Tensor:
    """One tensor of the file: of queries, keys, values and a feed-forward layer, or of scale and shift."""
    if "swapped" in parts:
        return torch.cat(list(reversed(parts["swapped"].chunk(2))))
    return torch.cat([parts[name] for name in sorted(parts, key="qkvw".find)])
