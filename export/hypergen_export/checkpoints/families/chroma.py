"""Chroma: FLUX.1-schnell's architecture without CLIP, and with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from hypergen_export.checkpoints.components import Sizes
from hypergen_export.checkpoints.families.tensors import HIDDEN_STATES, TEXT_MASK, transformer, vae
from hypergen_export.checkpoints.families.text_encoders import T5_TOKENIZER, t5, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, Sampling, TextInput

# Of ChromaPipeline. Padding has its share in the result, so every prompt has as many.
_TOKENS = 512
_PIPELINES = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")


def _sizes(configs: Configs) -> Sizes:
    text_encoder = configs.config("text_encoder")
    return {
        "vocabulary": int(text_encoder["vocab_size"]),
        "tokens": _TOKENS,
        "context_width": int(text_encoder["d_model"]),
        "latent_channels": int(configs.config("vae")["latent_channels"]),
        "time_width": int(configs.config("transformer").get("approximator_num_channels", 64)) // 4,
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser = configs["transformer"]
    given, expected = denoiser.get("in_channels", 64), 4 * sizes["latent_channels"]
    if given != expected:
        yield f"its transformer takes {given} channels, its VAE gives {expected}"
    if denoiser.get("patch_size", 1) != 1:
        yield f"its transformer has patches of {denoiser['patch_size']}"
    if (width := denoiser.get("joint_attention_dim", 4096)) != sizes["context_width"]:
        yield unread_features("transformer", width, sizes)


CHROMA = (
    Family(
        name="chroma",
        pipelines=dict.fromkeys(_PIPELINES, ConfigOverrides()),
        components=(
            t5("text_encoder", "tokens", "prompt", masked=True),
            transformer(
                "diffusers.ChromaTransformer2DModel",
                HIDDEN_STATES,
                replace(TEXT_MASK, axes=("tokens",)),
                wrapper="chroma",
            ),
            *vae(wrapper="shifted"),
        ),
        text=(TextInput(encoder="text_encoder", tokenizer_class=T5_TOKENIZER),),
        stated_inputs=lambda _: {"encoder_hidden_states", "text_mask"},
        read_sizes=_sizes,
        check=_check,
        sampling=Sampling(
            guidance="classifier_free",
            is_flow=True,
            flow_sigmas="linear",
            flow_shift="linear",
            patch_size=2,
        ),
        num_inference_steps=40,  # as in diffusers' example for Chroma1-HD; its pipeline has 35 and 5
        guidance_scale=3.0,
        distilled_steps=8,
        default_side=1024,
    ),
)
