"""Miniature checkpoints with the real architectures, small enough to be exported within a test run.

Weights are random with a fixed seed, so a call writes the same checkpoint on every machine. The models are untrained,
but behave like real ones: prompts and seeds change the images, which have enough contrast for an error in any tensor to
show in the pixels.

    python tests/support/miniature.py FOLDER [FAMILY]
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

PREDICTION_TYPES = ("epsilon", "v_prediction")
POSITIONS = 16
LATENT_CHANNELS = 4
SAMPLE_SIZE = 8
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("red", "blue", "green", "rocket", "cat", "on", "background")

# As the checkpoints of 1.x and XL state them; a family's entries come on top.
_SCHEDULER: dict[str, Any] = {
    "_diffusers_version": "0.32.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
_LCM = {"_class_name": "LCMScheduler", "clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}
_TCD = {"_class_name": "TCDScheduler", "clip_sample": False, "original_inference_steps": 50}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_TRAILING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
_TRAILING_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}

# What tells one UNet from another; the widths are ours. 2.x: heads by width, linear projections, OpenCLIP's width.
_UNET_1 = {"attention_head_dim": 8, "cross_attention_dim": 32}
_UNET_2 = {"attention_head_dim": (2, 4), "cross_attention_dim": 32, "use_linear_projection": True}
# XL: no attention at the top level, more of it below, and pooled prompt and six numbers of sizes beside the time.
_UNET_XL = {
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32 + 48,
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
# Latents, mask and the latents of the masked image.
_MASKED_IMAGE = {"in_channels": 2 * LATENT_CHANNELS + 1}
# Latents, and those of the image that is edited by instruction.
_EDITED_IMAGE = {"in_channels": 2 * LATENT_CHANNELS}
_GUIDANCE_EMBEDDED = {"time_cond_proj_dim": 32}
# Of XL's miniatures, `sdxl` alone shows that levels differ in depth: every block more takes seconds to export.
_SHALLOW = {"transformer_layers_per_block": 1}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells one family's miniature from another's. `pad_token` and `hidden_act` are the first text encoder's."""

    scheduler: Mapping[str, Any]
    unet: Mapping[str, Any]
    pipeline: str = "StableDiffusionPipeline"
    pad_token: str = END
    hidden_act: str = "quick_gelu"
    scaling_factor: float = 0.18215
    second_text_encoder: bool = False
    index: Mapping[str, Any] = field(default_factory=dict)


def _xl(scheduler: Mapping[str, Any], made_from: str = "", **unet: Any) -> Family:
    return Family(
        scheduler=scheduler,
        unet={**_UNET_XL, **unet},
        pipeline="StableDiffusionXLPipeline",
        scaling_factor=0.13025,
        second_text_encoder=True,
        index={"force_zeros_for_empty_prompt": True, **({"_name_or_path": made_from} if made_from else {})},
    )


FAMILIES: Mapping[str, Family] = {
    "sd-1": Family(scheduler=_PNDM, unet=_UNET_1),
    "sd-2": Family(
        scheduler={**_DDIM, "prediction_type": "v_prediction"}, unet=_UNET_2, pad_token="!", hidden_act="gelu"
    ),
    "sd-turbo": Family(
        scheduler=_TRAILING,
        unet=_UNET_2,
        pad_token="!",
        hidden_act="gelu",
        index={"_name_or_path": "stabilityai/sd-turbo"},
    ),
    "lcm": Family(scheduler=_LCM, unet=_UNET_1 | _GUIDANCE_EMBEDDED, pipeline="LatentConsistencyModelPipeline"),
    "tcd": Family(scheduler=_TCD, unet=_UNET_1),
    "sdxl": _xl(_EULER),
    "sd-inpainting": Family(scheduler=_DDIM, unet=_UNET_1 | _MASKED_IMAGE, pipeline="StableDiffusionInpaintPipeline"),
    "sdxl-inpainting": replace(
        _xl(_EULER, "", **_MASKED_IMAGE, **_SHALLOW), pipeline="StableDiffusionXLInpaintPipeline"
    ),
    "sdxl-turbo": _xl(_TRAILING_ANCESTRAL, "stabilityai/sdxl-turbo"),
    "sdxl-lightning": _xl(_TRAILING, "ByteDance/SDXL-Lightning"),
    "lcm-sdxl": _xl(_LCM, "", **_GUIDANCE_EMBEDDED, **_SHALLOW),
}
# Models that edit by instruction, and do nothing else.
EDITING_FAMILIES: Mapping[str, Family] = {
    "instruct-pix2pix": Family(
        scheduler=_EULER, unet=_UNET_1 | _EDITED_IMAGE, pipeline="StableDiffusionInstructPix2PixPipeline"
    ),
    "sdxl-instruct-pix2pix": replace(
        _xl(_EULER, "", **_EDITED_IMAGE), pipeline="StableDiffusionXLInstructPix2PixPipeline"
    ),
}


def save_miniature(
    folder: Path,
    *,
    family: str = "sd-1",
    prediction_type: str | None = None,
    scheduler: dict[str, Any] | None = None,
    pad_token: str | None = None,
) -> Path:
    """Write the checkpoint into `folder` and return it.

    `scheduler` replaces entries of scheduler_config.json (its `_class_name` too). `pad_token` "!" is what
    Stable Diffusion 2.x pads prompts with, "<|endoftext|>" what 1.x does.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type: {prediction_type!r} is none of {PREDICTION_TYPES}")
    kind = {**FAMILIES, **EDITING_FAMILIES}[family]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder / "tokenizer", pad_token or kind.pad_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        _text_encoder(vocabulary, kind.hidden_act).save_pretrained(folder / "text_encoder")
        _unet(kind).save_pretrained(folder / "unet")
        # Whatever the UNet: like published families, those of one VAE share its export.
        torch.manual_seed(7)
        _vae(kind).save_pretrained(folder / "vae")
        if kind.second_text_encoder:
            save_tokenizer(folder / "tokenizer_2", "!")
            _second_text_encoder(vocabulary).save_pretrained(folder / "text_encoder_2")
    changes = ({"prediction_type": prediction_type} if prediction_type else {}) | (scheduler or {})
    config = {**_SCHEDULER, **kind.scheduler, **changes}
    _write_json(folder / "scheduler" / "scheduler_config.json", config)
    _write_json(folder / "model_index.json", _index(kind, config["_class_name"]))
    return folder


def save_tiny_vae(folder: Path) -> Path:
    """Write an AutoencoderTiny for the miniatures' latents, with contrast."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4)
    with torch.no_grad():
        vae.decoder.layers[-1].weight.mul_(8)
    vae.save_pretrained(folder)
    return folder


def _index(kind: Family, scheduler: str) -> dict[str, Any]:
    second = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    unused = {"safety_checker": [None, None], "requires_safety_checker": False}
    return {
        "_class_name": kind.pipeline,
        "_diffusers_version": "0.32.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **(second if kind.second_text_encoder else unused),
        **kind.index,
    }


def _text_encoder(vocabulary: dict[str, int], hidden_act: str) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        hidden_act=hidden_act,
    )
    model = CLIPTextModel(config).eval()
    _amplify(model.get_input_embeddings(), 20.0)
    return model


def _second_text_encoder(vocabulary: dict[str, int]) -> CLIPTextModelWithProjection:
    """OpenCLIP's of XL, with the token ids that its config on the hub states: the end token is found by its rank."""
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=40,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_act="gelu",
    )
    model = CLIPTextModelWithProjection(config).eval()
    _amplify(model.get_input_embeddings(), 20.0)
    _amplify(model.text_projection, 8.0)
    return model


def _unet(kind: Family) -> UNet2DConditionModel:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        **{"in_channels": LATENT_CHANNELS, **blocks, **kind.unet},
    ).eval()
    _amplify(model.conv_out, 2.0)
    for name, module in model.named_modules():
        if name.endswith("attn2.to_out.0"):
            _amplify(module, 8.0)
    return model


def _vae(kind: Family) -> AutoencoderKL:
    model = AutoencoderKL(
        sample_size=SAMPLE_SIZE * 8,
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=kind.scaling_factor,
    ).eval()
    _amplify(model.decoder.conv_out, 3.0)
    return model


def _amplify(module: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        module.get_parameter("weight").mul_(factor)


def save_tokenizer(folder: Path, pad_token: str, positions: int = POSITIONS) -> dict[str, int]:
    """The files that a Stable Diffusion checkpoint brings; returns the vocabulary."""
    merges, merged = _merges()
    characters = list(_byte_characters())
    tokens = [*characters, *(f"{character}</w>" for character in characters), *merged, START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": positions, "do_lower_case": True},
    )
    return vocabulary


def _merges() -> tuple[list[str], list[str]]:
    """Merges that turn each of WORDS into one token, letter by letter from the left."""
    rules: dict[str, str] = {}
    for word in WORDS:
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for right in rest:
            rules.setdefault(f"{left} {right}", left + right)
            left += right
    return list(rules), list(rules.values())


def _byte_characters() -> Iterator[str]:
    """One printable character per byte value, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(0x100 + i) for i in range(256 - len(printable)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save_miniature(Path(sys.argv[1]), family=(sys.argv[2:] or ["sd-1"])[0])
