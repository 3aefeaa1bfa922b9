"""Sana 1.0 and 1.5, of 512 and 1024 pixels, and Sana-Sprint, which is distilled to a few steps.

A transformer with linear attention, and latents 32 times smaller than images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hypergen_export.checkpoints.components import WEIGHTS_ONLY, Component, Sizes, Tensor
from hypergen_export.checkpoints.families.tensors import (
    GUIDANCE,
    HIDDEN_STATES,
    TEXT_MASK,
    TOLERANCE,
    attention_mask,
    input_ids,
    transformer,
    vae,
)
from hypergen_export.checkpoints.families.text_encoders import GEMMA_TOKENIZER, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, Sampling, TextInput

# Of SanaPipeline: the tokens that the denoiser is given, and the instruction before a prompt.
_TOKENS = 300
_INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
# Of the wrapper's tables.
_MOST_POSITIONS = 2048
_LATENT_CHANNELS = 32  # AutoencoderDC's and SanaTransformer2DModel's default

_GEMMA2 = Component(
    name="text_encoder",
    module="text_encoder",
    loader="transformers.Gemma2Model",
    wrapper="gemma2",
    inputs=(
        input_ids("encoder_tokens", "prompt"),
        replace(attention_mask("encoder_tokens"), example="instructed_mask"),
    ),
    outputs=(HIDDEN_STATES,),
    tolerance=TOLERANCE,
    overflows_float16=True,  # it was trained in bfloat16
    is_typed=True,
    kept_layers={"layers": (0, 1)},
    quantized=WEIGHTS_ONLY,
)


def _transformer(*conditions: Tensor) -> Component:
    component = transformer(
        "diffusers.SanaTransformer2DModel",
        HIDDEN_STATES,
        replace(TEXT_MASK, axes=("tokens",)),
        *conditions,
        wrapper="sana",
    )
    return replace(component, quantized=WEIGHTS_ONLY)  # its grouped convolutions were not tried in fp8


# As it is typed, its linear attention is computed in float32, as in diffusers: it sums over all pixels.
_VAE = tuple(
    replace(component, is_typed=True, overflows_float16=True) for component in vae("diffusers.AutoencoderDC", "dc")
)


def _vae_levels(config: Config) -> int:
    return len(config.get("encoder_block_out_channels", (128, 256, 512, 512, 1024, 1024)))


def _sizes(configs: Configs) -> Sizes:
    text_encoder = configs.config("text_encoder")
    # The last token of the instruction may be one with the prompt's first, and is given to the denoiser.
    before = configs.token_count("tokenizer", _INSTRUCTION) - 1
    return {
        "vocabulary": int(text_encoder["vocab_size"]),
        "tokens": _TOKENS,
        "encoder_tokens": before + _TOKENS,
        "context_width": int(text_encoder["hidden_size"]),
        "latent_channels": int(configs.config("vae").get("latent_channels", _LATENT_CHANNELS)),
        "time_width": 256,
        "guidance_width": 256 if configs.config("transformer").get("guidance_embeds") else 0,
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser, text_encoder = configs["transformer"], configs["text_encoder"]
    channels = sizes["latent_channels"]
    for given in ("in_channels", "out_channels"):
        if (denoiser.get(given, _LATENT_CHANNELS) or channels) != channels:
            yield f"its transformer has {denoiser[given]} {given}, its VAE gives {channels}"
    if denoiser.get("patch_size", 1) != 1:
        yield f"its transformer has patches of {denoiser['patch_size']}"
    if (width := denoiser.get("caption_channels", 2304)) != sizes["context_width"]:
        yield unread_features("transformer", width, sizes)
    if denoiser.get("interpolation_scale") is not None:
        yield "its transformer has a table of positions, as those of 2048 and 4096 pixels have"
    if sizes["encoder_tokens"] > min(_MOST_POSITIONS, text_encoder.get("sliding_window") or _MOST_POSITIONS):
        yield f"its text encoder would read {sizes['encoder_tokens']} tokens"
    norms = configs["vae"].get("decoder_norm_types", "rms_norm")
    if {norms} != {"rms_norm"} if isinstance(norms, str) else set(norms) != {"rms_norm"}:
        yield f"its VAE normalises by {norms}"
    if text_encoder.get("use_bidirectional_attention"):
        yield "its text encoder attends to later tokens"


def _check_unguided(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    yield from _check(configs, sizes)
    if (scale := configs["transformer"].get("timestep_scale", 1.0)) != 1.0:
        yield f"its transformer scales timesteps by {scale}"


def _inputs(denoiser: Config) -> set[str]:
    guidance = {GUIDANCE.name} if denoiser.get("guidance_embeds") else set[str]()
    return {HIDDEN_STATES.name, TEXT_MASK.name} | guidance


def _family(name: str, *conditions: Tensor, **rest: Any) -> Family:
    return Family(
        name=name,
        components=(_GEMMA2, _transformer(*conditions), *_VAE),
        text=(
            TextInput(
                encoder="text_encoder",
                tokenizer_class=GEMMA_TOKENIZER,
                tokens="encoder_tokens",
                template=f"{_INSTRUCTION}{{}}",
                is_instruction=True,
            ),
        ),
        stated_inputs=_inputs,
        read_sizes=_sizes,
        guidance_scale=4.5,
        vae_levels=_vae_levels,
        **rest,
    )


# The VAE gives latents, not a distribution of them.
SANA = (
    _family(
        "sana",
        pipelines={"SanaPipeline": ConfigOverrides()},
        check=_check_unguided,
        sampling=Sampling(guidance="classifier_free", is_flow=True, encodes_mode=True),
        num_inference_steps=20,
    ),
    _family(
        "sana-sprint",
        GUIDANCE,
        pipelines=dict.fromkeys(("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), ConfigOverrides()),
        check=_check,
        sampling=Sampling(guidance="embedded", is_flow=True, encodes_mode=True),
        num_inference_steps=2,
    ),
)
