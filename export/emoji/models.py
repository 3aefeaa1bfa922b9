"""The four parts of the model and the folder they are shipped in.

Knows the architectures and the diffusers layout; knows nothing of how they are trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from captions import FILLERS, caption, plain_caption
from world import COLOUR_NAMES, NATIVE_SIDE, emoji_list

POSITIONS = 32
TEXT_WIDTH = 128
LATENT_CHANNELS = 16
VAE_FACTOR = 8
START, END = "<|startoftext|>", "<|endoftext|>"
# For every emoji a prompt that draws it, the colours in turn; the first one is what everybody tries.
SUGGESTED_COLOURS = ("yellow", "blue", "green", "purple", "white", "orange", "red", "black")
SUGGESTIONS = [
    plain_caption(emoji.name, SUGGESTED_COLOURS[index % len(SUGGESTED_COLOURS)])
    for index, emoji in enumerate(emoji_list())
]
DEFAULTS = {
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "width": NATIVE_SIDE,
    "height": NATIVE_SIDE,
    "min_size": 56,
    "max_size": 96,
    "suggestions": SUGGESTIONS,
}


def build_vae() -> AutoencoderKL:
    """Factor 8, sixteen channels: eight by eight latents with a real posterior diffuse far better than finer ones."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 112),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=NATIVE_SIDE,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Two levels, eight by eight and four by four at the native size, both of them looking at the caption.

    The caption is pooled into the timestep's embedding as well: cross-attention alone learns slowly what to draw.
    """
    return UNet2DConditionModel(
        sample_size=NATIVE_SIDE // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def corpus(seed: int) -> list[str]:
    """Captions and the meaningless words, so that every word the model was taught is one token."""
    random = Random(seed)
    emoji = emoji_list()
    lines = [caption(random, random.choice(emoji).names, random.choice(COLOUR_NAMES)) for _ in range(8000)]
    names = [name for one in emoji for name in one.names]
    return lines + [*names, *COLOUR_NAMES, "violet", *FILLERS] * 20


def _byte_pairs(seed: int) -> dict[str, Any]:
    """Vocabulary and merges learnt from the captions, in CLIP's conventions (bytes, `</w>` closes a word)."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1600, min_frequency=15, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(corpus(seed), trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    return model


def write_tokenizer(folder: Path, seed: int) -> None:
    """Learns the tokenizer and writes all three files: other readers of CLIP's format want vocab and merges."""
    folder.mkdir(parents=True, exist_ok=True)
    learnt = _byte_pairs(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    entries = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    read_tokenizer(folder).save_pretrained(folder)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=POSITIONS, pad_token=END
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 [N, POSITIONS], exactly what the diffusers pipeline feeds the text encoder."""
    encoded = tokenizer(
        texts, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt", add_special_tokens=True
    )
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def pipeline_of(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_checkpoint(pipeline: StableDiffusionPipeline, tokenizer_folder: Path, target: Path) -> None:
    """Writes the shipped folder beside the target and renames it into place: readers never see half of one."""
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copyfile(tokenizer_folder / name, fresh / "tokenizer" / name)
    _load_in_single_precision(fresh / "text_encoder" / "config.json")
    (fresh / "hypergen_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors keeps its temporary file's mode
    stale = target.with_name(target.name + ".old")
    shutil.rmtree(stale, ignore_errors=True)
    if target.exists():
        target.rename(stale)
    fresh.rename(target)
    shutil.rmtree(stale, ignore_errors=True)


def _load_in_single_precision(config: Path) -> None:
    """transformers takes the stored type for the one to compute in, diffusers does not: without this they differ."""
    content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
