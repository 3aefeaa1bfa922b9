"""The parts of the flow model and the folder it is saved in.

Knows Z-Image's architecture at small width and diffusers' layout for it; knows nothing of how it is trained, but for
`denoise`, which answers as the transformer does in less time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from models import DEFAULTS as UNET_DEFAULTS
from models import corpus

TEXT_WIDTH = 128
WIDTH = 192
# Z-Image pads the tokens of text and image, each by itself, to a multiple of this.
TOKENS = 32
POSITIONS = 512
SHIFT = 3.0  # of the sampler's noise levels; above 1, more of the noisy ones
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen3's chat template, as far as a prompt passes through it.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# Where Qwen's tokenizer splits a text before it merges bytes.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULTS: dict[str, Any] = {
    **UNET_DEFAULTS,
    "num_inference_steps": 10,
    "guidance_scale": 1.5,
    "min_size": 64,
    "max_size": 64,
}


def build_transformer() -> ZImageTransformer2DModel:
    """Z-Image's blocks: one for the image's tokens, one for the text's, six for both together."""
    transformer = ZImageTransformer2DModel(
        dim=WIDTH,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[16, 16, 16],
        axes_lens=[POSITIONS + TOKENS + 1, 64, 64],
    )
    for name, value in transformer.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            nn.init.zeros_(value)  # every block begins as the identity, and the answer as nothing
        elif "pad_token" in name:
            nn.init.normal_(value, std=0.02)
    return transformer


def build_text_encoder(vocabulary: int) -> Qwen3Model:
    """Four layers; the states before the last one are what Z-Image looks at."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        use_cache=False,
    )
    return Qwen3Model(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def write_tokenizer(folder: Path, seed: int) -> None:
    """Byte pairs learnt from the captions, in the files of Qwen's tokenizer."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    lines = corpus(seed)
    spoken = [*lines, *(f" {line}" for line in lines), *(line[:1].upper() + line[1:] for line in lines)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([*spoken, *["user\n", "assistant\n"] * 200], trainer)
    learner.add_special_tokens([END_OF_TEXT, START, END])
    learner.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner,
        pad_token=END_OF_TEXT,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        padding_side="right",
    )
    tokenizer.save_pretrained(folder)
    learnt = json.loads(learner.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(learnt["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join("{} {}".format(*pair) for pair in learnt["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "Qwen2Tokenizer"}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(folder)


def tokenize(tokenizer: Qwen2Tokenizer, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """int64 [N, length] and bool [N, length]: the ids of prompts in their template, and which are no padding."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for prompt in prompts
    ]
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


def states_of(text_encoder: Qwen3Model, ids: Tensor, mask: Tensor) -> Tensor:
    """float [N, T, TEXT_WIDTH]: what the pipeline takes from the text encoder."""
    states: Tensor = text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return states


def denoise(transformer: Any, latents: Tensor, time: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """float [N, C, H, W]: what `ZImageTransformer2DModel` answers for images of one size [N, C, H, W].

    `time` [N] is 1 minus the share of noise; text `states` [N, T, D], with T a multiple of `TOKENS`. The model pads the
    image's tokens with equal ones at one place, which therefore stay equal: they are computed once, and attention to
    that one is multiplied by their number.
    """
    count, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    patches = (
        latents.view(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, -1)
    )
    image = transformer.all_x_embedder["2-1"](patches)
    own = image.shape[1]
    padding = -own % TOKENS
    places = torch.cartesian_prod(torch.tensor([states.shape[1] + 1]), torch.arange(rows), torch.arange(columns))
    weights = torch.zeros(own)
    if padding:
        image = torch.cat([image, transformer.x_pad_token.expand(count, 1, -1)], 1)
        places = torch.cat([places, torch.zeros(1, 3, dtype=torch.int64)])
        weights = torch.cat([weights, torch.tensor([padding]).log()])
    text = torch.where(mask[..., None], transformer.cap_embedder(states), transformer.cap_pad_token)
    text_places = torch.zeros(states.shape[1], 3, dtype=torch.int64)
    text_places[:, 0] = torch.arange(states.shape[1]) + 1
    rotary = transformer.rope_embedder(torch.cat([places, text_places]))[None]
    weights = torch.cat([weights, torch.zeros(states.shape[1])])[None, None, None]
    modulation = transformer.t_embedder(time * transformer.t_scale)
    tokens = image.shape[1]
    for block in transformer.noise_refiner:
        image = block(image, weights[..., :tokens], rotary[:, :tokens], modulation)
    for block in transformer.context_refiner:
        text = block(text, None, rotary[:, tokens:])
    both = torch.cat([image, text], 1)
    for block in transformer.layers:
        both = block(both, weights, rotary, modulation)
    answer: Tensor = transformer.all_final_layer["2-1"](both[:, :own], c=modulation)
    answer = answer.view(count, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return answer.reshape(count, channels, height, width)


def pipeline_of(vae: AutoencoderKL, text_encoder: Qwen3Model, tokenizer: Any, transformer: Any) -> ZImagePipeline:
    return ZImagePipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=build_scheduler()
    )


def save_checkpoint(pipeline: ZImagePipeline, tokenizer_folder: Path, target: Path) -> None:
    """Writes the folder beside the target and renames it into place: readers never see half of one."""
    fresh, stale = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    shutil.rmtree(fresh / "tokenizer")
    shutil.copytree(tokenizer_folder, fresh / "tokenizer")
    config = fresh / "text_encoder" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (fresh / "hypergen_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors keeps its temporary file's mode
    shutil.rmtree(stale, ignore_errors=True)
    if target.exists():
        target.rename(stale)
    fresh.rename(target)
    shutil.rmtree(stale, ignore_errors=True)
