"""Single files as model sites distribute them, made of miniatures: diffusers' folder, and the same tensors by the names
of latent diffusion.

The names are diffusers' `scripts/convert_diffusers_to_original_stable_diffusion.py` and `…_sdxl.py`: its conversion
reversed. Widths are ours; what a file cannot say (64 features per head, 32 groups) is as in the published models.

    python tests/support/single_files.py FOLDER KIND
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from hypergen_export.single_files.clip_vocabulary import write_clip_tokenizer

Tensors = dict[str, torch.Tensor]
_VOCABULARY = 49408
_POOLED = 64


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """A kind of single file. `pipeline` is diffusers' class; `unet` are entries of its UNet's config."""

    pipeline: str
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    open_clip: bool = False
    scaling_factor: float = 0.18215
    sample_size: int = 8
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_xl(self) -> bool:
        return "XL" in self.pipeline


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_PNDM = {**_BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
_DDIM = {**_BETAS, "_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
_EULER = {**_BETAS, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_SMALL_LEVELS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_UNET_1 = {**_SMALL_LEVELS, "attention_head_dim": 8, "cross_attention_dim": 64, "layers_per_block": 2}
_UNET_2 = {
    **_SMALL_LEVELS,
    "block_out_channels": (64, 64),
    "attention_head_dim": (1, 1),
    "cross_attention_dim": 64,
    "layers_per_block": 2,
    "use_linear_projection": True,
}
_UNET_XL = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (0, 1, 2),
    "cross_attention_dim": 64 + 128,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": _POOLED + 6 * 8,
}
# With all that tells XL from others, but shallow: a model of every block takes a minute to export.
_UNET_XL_SHALLOW = {
    **_UNET_XL,
    "block_out_channels": (32, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (0, 2),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1),
}
# SSD-1B: fewer transformer blocks, others on the way up, none in the middle.
_UNET_SSD = {
    **_UNET_XL,
    "transformer_layers_per_block": (1, (1, 1), (2, 2)),
    "reverse_transformer_layers_per_block": ((2, 2, 3), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
}


def _sd_1(**unet: Any) -> Miniature:
    return Miniature(pipeline="StableDiffusionPipeline", unet=_UNET_1 | unet, scheduler=_PNDM)


def _sd_2(prediction_type: str) -> Miniature:
    return Miniature(
        pipeline="StableDiffusionPipeline",
        unet=_UNET_2,
        scheduler=_DDIM | {"prediction_type": prediction_type},
        open_clip=True,
    )


def _sdxl(
    pipeline: str = "StableDiffusionXLPipeline", unet: Mapping[str, Any] = _UNET_XL, **scheduler: Any
) -> Miniature:
    index = {"force_zeros_for_empty_prompt": True}
    return Miniature(pipeline=pipeline, unet=unet, scheduler=_EULER | scheduler, scaling_factor=0.13025, index=index)


MINIATURES: Mapping[str, Miniature] = {
    "sd-1": _sd_1(),
    "sd-2": _sd_2("v_prediction"),
    "sd-2-base": _sd_2("epsilon"),
    "sdxl": _sdxl(),
    "sdxl-v": _sdxl(
        unet=_UNET_XL_SHALLOW,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "ssd-1b": _sdxl(unet=_UNET_SSD),
    "sd-1-inpainting": replace(_sd_1(in_channels=9), pipeline="StableDiffusionInpaintPipeline"),
    "sd-2-inpainting": replace(
        _sd_2("epsilon"), pipeline="StableDiffusionInpaintPipeline", unet={**_UNET_2, "in_channels": 9}
    ),
    "sd-1-instruct": replace(_sd_1(in_channels=8), pipeline="StableDiffusionInstructPix2PixPipeline"),
    "sdxl-inpainting": _sdxl("StableDiffusionXLInpaintPipeline", {**_UNET_XL, "in_channels": 9}),
}


def save_folder(folder: Path, kind: str) -> Path:
    """Write a miniature as a folder in diffusers' layout."""
    made = MINIATURES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        modules = dict(_modules(made))
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    parts = {
        name: [type(module).__module__.partition(".")[0], type(module).__name__] for name, module in modules.items()
    }
    for tokenizer in ("tokenizer", "tokenizer_2") if made.is_xl else ("tokenizer",):
        is_open_clip = made.open_clip or tokenizer == "tokenizer_2"
        write_clip_tokenizer(folder / tokenizer, "!" if is_open_clip else "<|endoftext|>")
        parts[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(made.scheduler))
    index = {
        "_class_name": made.pipeline,
        "scheduler": ["diffusers", made.scheduler["_class_name"]],
        **parts,
        **made.index,
    }
    unused = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    (folder / "model_index.json").write_text(json.dumps(unused | index))
    return folder


def save_single_file(path: Path, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write the tensors of a folder by the names of latent diffusion."""
    tensors = {name: tensor.to(dtype) for name, tensor in original_tensors(folder, MINIATURES[kind]).items()}
    metadata = {"modelspec.prediction_type": "v"} if kind == "sd-2" else {"format": "pt"}
    if kind == "sdxl-v":
        tensors |= {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    else:
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    return path


def original_tensors(folder: Path, made: Miniature) -> Tensors:
    """The tensors of a folder by the names of latent diffusion, with those that it has beside the modules."""
    modules = {name: module.state_dict() for name, module in dict(_load(folder, made)).items()}
    layers = made.unet["layers_per_block"]
    tensors = {f"model.diffusion_model.{name}": each for name, each in _unet_tensors(modules["unet"], layers)}
    tensors |= {f"first_stage_model.{name}": each for name, each in _vae_tensors(modules["vae"])}
    if made.is_xl:
        tensors |= _clip_tensors("conditioner.embedders.0.transformer.", modules["text_encoder"])
        tensors |= _open_clip_tensors("conditioner.embedders.1.model.", modules["text_encoder_2"])
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    elif made.open_clip:
        # The last layer is not used, and not in the folder.
        text = _open_clip_tensors("cond_stage_model.model.", modules["text_encoder"])
        last = {name.replace(".0.", ".23."): each for name, each in text.items() if "resblocks.0." in name}
        tensors |= text | last | {"cond_stage_model.model.text_projection": torch.eye(64)}
    else:
        tensors |= _clip_tensors("cond_stage_model.transformer.", modules["text_encoder"])
    return tensors | {"betas": torch.linspace(0, 1, 1000)}


def _modules(made: Miniature) -> Iterator[tuple[str, Any]]:
    unet = diffusers.UNet2DConditionModel(sample_size=made.sample_size, **made.unet)
    yield "unet", unet
    vae = diffusers.AutoencoderKL(
        sample_size=8 * made.sample_size,
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=made.scaling_factor,
    )
    yield "vae", vae
    text_encoder = transformers.CLIPTextModel(_clip("gelu" if made.open_clip else "quick_gelu", 64))
    yield "text_encoder", text_encoder
    if made.is_xl:
        yield "text_encoder_2", transformers.CLIPTextModelWithProjection(_clip("gelu", 128))
    # Untrained modules hardly tell prompts apart, and their images are grey.
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn2.to_out.0")]
    for module, factor in (
        (unet.conv_out, 2.0),
        (vae.decoder.conv_out, 3.0),
        (text_encoder.get_input_embeddings(), 20.0),
        *((attention, 8.0) for attention in attentions),
    ):
        with torch.no_grad():
            module.weight.mul_(factor)


def _clip(hidden_act: str, width: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=_POOLED,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_act=hidden_act,
    )


def _load(folder: Path, made: Miniature) -> Iterator[tuple[str, Any]]:
    yield "unet", diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    yield "vae", diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    yield "text_encoder", transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    if made.is_xl:
        yield "text_encoder_2", transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")


# Of the UNet, by diffusers' names -> by those of latent diffusion.
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _unet_tensors(tensors: Tensors, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    attentions = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.attentions", name)}
    for name, tensor in tensors.items():
        # A block's upsampler comes after its resnet, and its attention if there is one.
        upsampler = 2 if name.split(".")[1] in attentions else 1
        yield _unet_name(name, layers).format(upsampler=upsampler), tensor


def _unet_name(name: str, layers: int) -> str:
    for theirs, original in _UNET.items():
        if name.startswith(f"{theirs}."):
            name = name.replace(theirs, original)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match:
        name = _block_name(match, layers)
    if re.match(r"((input|output)_blocks\.\d+\.0|middle_block\.[02])\.", name):
        for theirs, original in _RESNET.items():
            name = re.sub(rf"(?<=\.){theirs}(?=\.(weight|bias)$)", original, name)
    return name


def _block_name(match: re.Match[str], layers: int) -> str:
    way, level, part, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    place = level * (layers + 1) + layer + (way == "down")
    block = f"{'input' if way == 'down' else 'output'}_blocks"
    if part == "downsamplers":
        return f"{block}.{place + layers}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"{block}.{place + layers}.{{upsampler}}.{rest}"
    return f"{block}.{place}.{0 if part == 'resnets' else 1}.{rest}"


def _vae_tensors(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down_blocks."))
    for name, tensor in tensors.items():
        for theirs, original in _VAE.items():
            name = re.sub(rf"(?<=\.){re.escape(theirs)}(?=\.)", original, name)
        name = re.sub(r"down_blocks\.(\d+)\.(resnets\.(\d+)|downsamplers\.0)", _vae_block("down", levels), name)
        name = re.sub(r"up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)", _vae_block("up", levels), name)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        yield name, tensor[:, :, None, None] if is_attention else tensor


def _vae_block(way: str, levels: int) -> Any:
    def rename(match: re.Match[str]) -> str:
        level = int(match[1]) if way == "down" else levels - 1 - int(match[1])
        return f"{way}.{level}." + (f"block.{match[3]}" if match[3] else f"{way}sample")

    return rename


def _clip_tensors(prefix: str, tensors: Tensors) -> Tensors:
    named = {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return named | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def _open_clip_tensors(prefix: str, tensors: Tensors) -> Tensors:
    named: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            named[f"{prefix}text_projection"] = tensor.T
        elif ".q_proj." in name:
            parts = [
                tensors[next(each for each in tensors if each.endswith(name.replace("q_proj", part)))]
                for part in ("q_proj", "k_proj", "v_proj")
            ]
            renamed = _open_clip_name(name).replace("self_attn.q_proj.", "attn.in_proj_")
            named[prefix + renamed] = torch.cat(parts)
        elif "_proj." not in name or "out_proj" in name:
            named[prefix + _open_clip_name(name)] = tensor
    return named


def _open_clip_name(name: str) -> str:
    for theirs, original in _OPEN_CLIP.items():
        name = name.replace(theirs, original)
    return name


if __name__ == "__main__":
    made_folder = save_folder(Path(sys.argv[1]) / "folder", sys.argv[2])
    save_single_file(Path(sys.argv[1]) / f"{sys.argv[2]}.safetensors", made_folder, sys.argv[2])
