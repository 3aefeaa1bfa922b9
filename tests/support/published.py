"""Checkpoints with the architectures that are published, without their weights: configs, headers and empty files.

Widths and depths are those of the published configs. The weight files have the right headers and lengths, and take no
space on the disk, unless they are given random values.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import diffusers
import torch
import transformers

Modules = Mapping[str, Callable[[], torch.nn.Module]]

_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_WIDTHS = (128, 256, 512, 512)


def _vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=_WIDTHS,
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        **_BLOCKS,
    )


def _flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(block_out_channels=_WIDTHS, layers_per_block=2, latent_channels=32, **_BLOCKS)


def _clip(kind: Any, width: int, layers: int, projection: int) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=projection,
    )
    return kind(config)


def _clip_l(kind: Any = transformers.CLIPTextModel) -> Any:
    return _clip(kind, 768, 12, 768)


def _clip_g() -> Any:
    return _clip(transformers.CLIPTextModelWithProjection, 1280, 32, 1280)


def _t5_xxl() -> Any:
    config = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def _qwen3(kind: Any, width: int, inner: int) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    return kind(config)


def _qwen2_5_vl() -> Any:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=text))


def _stable_diffusion_3_5(layers: int, heads: int, positions: int, dual: int) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=positions,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )


def _klein(layers: int, single: int, heads: int, context: int) -> Any:
    return diffusers.Flux2Transformer2DModel(
        num_layers=layers,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=context,
        guidance_embeds=False,
    )


def _z_image() -> Any:
    return diffusers.ZImageTransformer2DModel(dim=3840, n_layers=30, n_heads=30, n_kv_heads=30, cap_feat_dim=2560)


def _gemma2() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config())


def _sana() -> Any:
    return diffusers.SanaTransformer2DModel(qk_norm="rms_norm_across_heads")


def _dc_vae() -> Any:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return diffusers.AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )


def unet_1_5() -> Any:
    """The UNet of Stable Diffusion 1.5."""
    return diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280)
    )


def unet_xl() -> Any:
    """The UNet of SDXL."""
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1280 + 6 * 256,
    )


_SD3_TEXT: Modules = {
    "text_encoder": lambda: _clip_l(transformers.CLIPTextModelWithProjection),
    "text_encoder_2": _clip_g,
    "text_encoder_3": _t5_xxl,
    "vae": lambda: _vae(16),
}
# Name -> the miniature whose tokenizers, scheduler and index it has, and its modules.
PUBLISHED: Mapping[str, tuple[str, Modules]] = {
    "Stable Diffusion 1.5": ("sd-1", {"text_encoder": _clip_l, "unet": unet_1_5, "vae": lambda: _vae(4)}),
    "SDXL": (
        "sdxl",
        {"text_encoder": _clip_l, "text_encoder_2": _clip_g, "unet": unet_xl, "vae": lambda: _vae(4)},
    ),
    "Stable Diffusion 3.5 Medium": (
        "stable-diffusion-3",
        {**_SD3_TEXT, "transformer": lambda: _stable_diffusion_3_5(24, 24, 384, 13)},
    ),
    "Stable Diffusion 3.5 Large": (
        "stable-diffusion-3",
        {**_SD3_TEXT, "transformer": lambda: _stable_diffusion_3_5(38, 38, 192, 0)},
    ),
    "FLUX.1-dev": (
        "flux1-dev",
        {
            "text_encoder": _clip_l,
            "text_encoder_2": _t5_xxl,
            "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
            "vae": lambda: _vae(16),
        },
    ),
    "Chroma1-HD": (
        "chroma",
        {"text_encoder": _t5_xxl, "transformer": diffusers.ChromaTransformer2DModel, "vae": lambda: _vae(16)},
    ),
    "FLUX.2-klein-4B": (
        "flux2-klein",
        {
            "text_encoder": lambda: _qwen3(transformers.Qwen3ForCausalLM, 2560, 9728),
            "transformer": lambda: _klein(5, 20, 24, 3 * 2560),
            "vae": _flux2_vae,
        },
    ),
    "FLUX.2-klein-9B": (
        "flux2-klein",
        {
            "text_encoder": lambda: _qwen3(transformers.Qwen3ForCausalLM, 4096, 12288),
            "transformer": lambda: _klein(8, 24, 32, 3 * 4096),
            "vae": _flux2_vae,
        },
    ),
    "Z-Image": (
        "z-image",
        {
            "text_encoder": lambda: _qwen3(transformers.Qwen3Model, 2560, 9728),
            "transformer": _z_image,
            "vae": lambda: _vae(16),
        },
    ),
    "Qwen-Image": (
        "qwen-image",
        {
            "text_encoder": _qwen2_5_vl,
            "transformer": diffusers.QwenImageTransformer2DModel,
            "vae": diffusers.AutoencoderKLQwenImage,
        },
    ),
    "Sana 1.5 1.6B": ("sana-1.5", {"text_encoder": _gemma2, "transformer": _sana, "vae": _dc_vae}),
}


# Bytes of a weight file, as transformers writes them.
_LARGEST_SHARD = 5 * 10**9
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Random numbers that large tensors repeat.
_RANDOM_NUMBERS = 2**24


def publish(name: str, miniature: Path, folder: Path, *, has_values: bool = False, without: Sequence[str] = ()) -> Path:
    """Write the checkpoint `name` into the new `folder`, from the miniature that it is like.

    With values, weights are random; otherwise they take no space. `without` are modules that a checkpoint may lack.
    """
    shutil.copytree(miniature, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for module, make in PUBLISHED[name][1].items():
        if module in without:
            shutil.rmtree(folder / module)
            index[module] = [None, None]
            continue
        with torch.device("meta"):
            made = make()
        replace_module(folder / module, made, has_values=has_values)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def replace_module(folder: Path, module: Any, *, has_values: bool = False) -> None:
    """Replace a module by one whose weights are named and, without values, not there: files without blocks."""
    _write_config(folder, module)
    _write_weights(folder, module, has_values=has_values)


def _write_config(folder: Path, module: Any) -> None:
    config = dict(module.config) if isinstance(module, diffusers.ModelMixin) else module.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str))


def _write_weights(folder: Path, module: Any, *, has_values: bool) -> None:
    first, *others = sorted(folder.glob("*.safetensors*"))
    for each in (first, *others):
        each.unlink()  # it may be a link to another checkpoint's
    file = first.with_stem(_SHARD.sub("", first.stem))
    tied = getattr(module, "_tied_weights_keys", None) or ()
    shards = _shards({name: tensor.shape for name, tensor in module.state_dict().items() if name not in tied})
    if len(shards) == 1:
        _write_file(file, shards[0], has_values=has_values)
        return
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        shard = file.with_stem(f"{file.stem}-{number:05}-of-{len(shards):05}")
        _write_file(shard, shapes, has_values=has_values)
        places |= dict.fromkeys(shapes, shard.name)
    file.with_suffix(".safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _shards(shapes: Mapping[str, torch.Size]) -> list[dict[str, torch.Size]]:
    """The tensors of each file."""
    shards: list[dict[str, torch.Size]] = [{}]
    taken = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        if shards[-1] and taken + length > _LARGEST_SHARD:
            shards.append({})
            taken = 0
        shards[-1][name] = shape
        taken += length
    return shards


def _write_file(file: Path, shapes: Mapping[str, torch.Size], *, has_values: bool) -> None:
    """Tensors in bfloat16, one after another."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
        for name, shape in shapes.items() if has_values else ():
            begin = 8 + len(text) + header[name]["data_offsets"][0]
            _write_values(opened, begin, name, shape)


def _write_values(file: BinaryIO, begin: int, name: str, shape: torch.Size) -> None:
    """Weights whose layers keep about the size of what goes through them; places in images stay zero."""
    elements = math.prod(shape)
    if name.endswith(("bias", "running_mean", "pos_embed")):
        return
    file.seek(begin)
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.0
    numbers = torch.ones(elements) if len(shape) < 2 else _random_numbers()[:elements] * scale
    content = numbers.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    for _ in range(elements // len(numbers)):
        file.write(content)
    file.write(content[: 2 * (elements % len(numbers))])


@cache
def _random_numbers() -> torch.Tensor:
    return torch.randn(_RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0))
