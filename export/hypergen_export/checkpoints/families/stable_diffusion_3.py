"""Stable Diffusion 3 and 3.5, with and without T5.

3.5 Medium, the only one with dual attention, has skip-layer guidance, as its card advises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hypergen_export.checkpoints.components import FLOAT, Component, Sizes, Tensor
from hypergen_export.checkpoints.families.tensors import POOLED, SKIP, TOLERANCE, input_ids, transformer, vae
from hypergen_export.checkpoints.families.text_encoders import T5_TOKENIZER, t5, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, Sampling, TextInput

_MAX_TOKENS = 256  # of T5, in StableDiffusion3Pipeline
_HIDDEN_STATES = Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("context_tokens", "context_width"))


def _clip(name: str, suffix: str) -> Component:
    return Component(
        name=name,
        module=name,
        loader="transformers.CLIPTextModelWithProjection",
        wrapper="pooled_text_encoder",
        inputs=(input_ids("tokens", f"prompt{suffix}"),),
        outputs=(
            Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", f"text_width{suffix}")),
            Tensor(name="text_embeds", dtype=FLOAT, axes=(f"projection_width{suffix}",)),
        ),
        tolerance=TOLERANCE,
        is_typed=True,
        kept_layers={"encoder.layers": (0, -1)},
    )


_CLIPS = (_clip("text_encoder", ""), _clip("text_encoder_2", "_2"))
# CLIP's hidden states side by side, then T5's.
_CLIP_TEXT = (
    TextInput(encoder="text_encoder"),
    TextInput(encoder="text_encoder_2", tokenizer="tokenizer_2"),
)
_T5_TEXT = TextInput(
    encoder="text_encoder_3", tokenizer="tokenizer_3", tokenizer_class=T5_TOKENIZER, tokens="tokens_3", segment=1
)


def _has_t5(index: Config) -> bool:
    return any(index.get("text_encoder_3") or ())


def _sizes(configs: Configs) -> Sizes:
    first, second = configs.config("text_encoder"), configs.config("text_encoder_2")
    lengths = (
        configs.tokenizer_length("tokenizer"),
        first["max_position_embeddings"],
        second["max_position_embeddings"],
    )
    tokens = min(int(length) for length in lengths if length)
    return {
        "vocabulary": int(first["vocab_size"]),
        "vocabulary_2": int(second["vocab_size"]),
        "text_width": int(first["hidden_size"]),
        "text_width_2": int(second["hidden_size"]),
        "projection_width": int(first["projection_dim"]),
        "projection_width_2": int(second["projection_dim"]),
        "pooled_width": int(first["projection_dim"]) + int(second["projection_dim"]),
        "tokens": tokens,
        "context_tokens": tokens,
        "context_width": int(first["hidden_size"]) + int(second["hidden_size"]),
        "latent_channels": int(configs.config("vae")["latent_channels"]),
        "time_width": 256,
    }


def _sizes_with_t5(configs: Configs) -> Sizes:
    clip, encoder = _sizes(configs), configs.config("text_encoder_3")
    return {
        **clip,
        "vocabulary_3": int(encoder["vocab_size"]),
        "tokens_3": _MAX_TOKENS,
        "context_tokens": clip["tokens"] + _MAX_TOKENS,
        "context_width": max(clip["context_width"], int(encoder["d_model"])),
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser = configs["transformer"]
    if denoiser.get("in_channels") != sizes["latent_channels"]:
        yield f"its transformer takes {denoiser.get('in_channels')} channels, its VAE gives {sizes['latent_channels']}"
    if denoiser.get("patch_size", 2) != 2:
        yield "its transformer has other patches than 2 × 2"
    # Without T5, the wrapper pads the hidden states.
    width = denoiser.get("joint_attention_dim", 4096)
    if sizes["context_width"] > width or ("tokens_3" in sizes and sizes["context_width"] != width):
        yield unread_features("transformer", width, sizes)
    if denoiser.get("pooled_projection_dim", 2048) != sizes["pooled_width"]:
        yield (
            f"its transformer reads {denoiser.get('pooled_projection_dim')} pooled features, its text encoders give "
            f"{sizes['pooled_width']}"
        )
    # The largest image that is served has twice the side of the default one.
    if denoiser.get("pos_embed_max_size", 96) < int(denoiser.get("sample_size", 128)):
        yield f"its transformer has positions for {denoiser.get('pos_embed_max_size', 96)} tokens per side"


def _inputs(denoiser: Config) -> set[str]:
    return {_HIDDEN_STATES.name, POOLED.name, *({SKIP.name} if denoiser.get("dual_attention_layers") else ())}


def _family(name: str, *, is_medium: bool, **rest: Any) -> Family:
    return Family(
        name=name,
        pipelines=dict.fromkeys(
            ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
            ConfigOverrides(),
        ),
        stated_inputs=_inputs,
        check=_check,
        sampling=Sampling(is_flow=True, flow_shift="linear", patch_size=2),
        num_inference_steps=40 if is_medium else 28,
        guidance_scale=4.5 if is_medium else 3.5,  # of 3.5 Medium and 3.5 Large
        # 3, which does not normalise queries and keys.
        read_card=lambda denoiser, _: None if denoiser.get("qk_norm") else (28, 7.0),
        **rest,
    )


def _transformer(wrapper: str, *, is_medium: bool) -> Component:
    conditions = (_HIDDEN_STATES, POOLED, *((SKIP,) if is_medium else ()))
    component = transformer("diffusers.SD3Transformer2DModel", *conditions, wrapper=wrapper)
    return replace(
        component,
        # Of the table of positions, rows and columns are kept.
        computed_with=("pos_embed.pos_embed",),
        unused=("pos_embed.pos_embed",),
        # One that can be skipped between those with and without dual attention.
        kept_layers={"transformer_blocks": (0, 7, -1)} if is_medium else component.kept_layers,
    )


def _families(suffix: str, *, is_medium: bool) -> tuple[Family, Family]:
    """With and without T5."""
    with_t5 = (*_CLIPS, t5("text_encoder_3", "tokens_3", "prompt_3"))
    rest = vae(wrapper="shifted")
    return (
        _family(
            f"stable-diffusion-{suffix}",
            is_medium=is_medium,
            components=(*with_t5, _transformer("stable_diffusion_3", is_medium=is_medium), *rest),
            text=(*_CLIP_TEXT, _T5_TEXT),
            read_sizes=_sizes_with_t5,
            is_named_by=_has_t5,
        ),
        _family(
            f"stable-diffusion-{suffix}-without-t5",
            is_medium=is_medium,
            components=(*_CLIPS, _transformer("stable_diffusion_3_without_t5", is_medium=is_medium), *rest),
            text=_CLIP_TEXT,
            read_sizes=_sizes,
            is_named_by=lambda index: not _has_t5(index),
        ),
    )


STABLE_DIFFUSION_3 = (*_families("3", is_medium=False), *_families("3.5-medium", is_medium=True))
