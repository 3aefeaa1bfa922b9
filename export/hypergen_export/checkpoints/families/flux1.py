"""FLUX.1-dev, -schnell and -Kontext; FLUX.1-Krea is a -dev with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypergen_export.checkpoints.components import Sizes, Tensor
from hypergen_export.checkpoints.families.tensors import GUIDANCE, HIDDEN_STATES, POOLED, REFERENCES, transformer, vae
from hypergen_export.checkpoints.families.text_encoders import T5_TOKENIZER, clip_pooled, clip_tokens, t5
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, References, Sampling, TextInput

_EMBEDDING_WIDTH = 256  # of diffusers' CombinedTimestepGuidanceTextProjEmbeddings
# All tokens are attended to, padding included. -schnell was published with 256 of them (its model card, and the
# reference implementation), though FluxPipeline's default is 512 for both.
_TOKENS, _TOKENS_SCHNELL = 512, 256
_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
_KONTEXT_PIPELINES = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
# FluxKontextPipeline's PREFERRED_KONTEXT_RESOLUTIONS, about a megapixel each: the model was trained on them.
_KONTEXT_SIDES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
)
_KONTEXT_SIZES = (*_KONTEXT_SIDES, (1024, 1024), *((long, short) for short, long in reversed(_KONTEXT_SIDES)))
_KONTEXT_REFERENCES = References(
    count=1,
    pixels=max(width * height for width, height in _KONTEXT_SIZES),
    sizes=tuple(f"{width}x{height}" for width, height in _KONTEXT_SIZES),
    position_step=1,
    yields=True,
)
# Channels of a transformer made for another pipeline -> what it takes beside the latents.
_CHANNELS = {384: "a mask and a masked image", 128: "a control image"}


def _has_guidance(denoiser: Config) -> bool:
    return bool(denoiser.get("guidance_embeds", False))


def _stated_inputs(denoiser: Config) -> set[str]:
    guidance = {"guidance"} if _has_guidance(denoiser) else set[str]()
    return {"encoder_hidden_states", "text_embeds"} | guidance


def _stated_kontext_inputs(denoiser: Config) -> set[str]:
    return _stated_inputs(denoiser) | {tensor.name for tensor in REFERENCES}


def _sizes(configs: Configs) -> Sizes:
    clip, text_encoder = configs.config("text_encoder"), configs.config("text_encoder_2")
    has_guidance = _has_guidance(configs.config("transformer"))
    return {
        "vocabulary": int(clip["vocab_size"]),
        "vocabulary_2": int(text_encoder["vocab_size"]),
        "clip_tokens": clip_tokens(configs, "tokenizer", clip),
        "tokens": _TOKENS if has_guidance else _TOKENS_SCHNELL,
        "context_width": int(text_encoder["d_model"]),
        "pooled_width": int(clip["hidden_size"]),
        "latent_channels": int(configs.config("vae")["latent_channels"]),
        "time_width": _EMBEDDING_WIDTH,
        "guidance_width": _EMBEDDING_WIDTH if has_guidance else 0,
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser = configs["transformer"]
    given, expected = denoiser.get("in_channels", 64), 4 * sizes["latent_channels"]
    if given != expected:
        taken = f" ({_CHANNELS[given]} beside the latents)" if given in _CHANNELS else ""
        yield f"its transformer takes {given} channels{taken}, its VAE gives {expected}"
    if denoiser.get("patch_size", 1) != 1:
        yield f"its transformer has patches of {denoiser['patch_size']}"
    for name, encoder, width in (
        ("joint_attention_dim", "text_encoder_2", "context_width"),
        ("pooled_projection_dim", "text_encoder", "pooled_width"),
    ):
        if denoiser.get(name) != sizes[width]:
            yield f"its transformer has a {name} of {denoiser.get(name)}, its {encoder} gives {sizes[width]} features"


def _flux1(name: str, guidance: str, *conditions: Tensor, references: References | None = None, **rest: Any) -> Family:
    return Family(
        name=name,
        pipelines=dict.fromkeys(_KONTEXT_PIPELINES if references else _PIPELINES, ConfigOverrides()),
        components=(
            clip_pooled("clip_tokens"),
            t5("text_encoder_2", "tokens", "prompt_2"),
            transformer("diffusers.FluxTransformer2DModel", HIDDEN_STATES, POOLED, *conditions, wrapper="flux1"),
            *vae(wrapper="shifted"),
        ),
        text=(
            TextInput(encoder="text_encoder", tokens="clip_tokens", segment=None),
            TextInput(encoder="text_encoder_2", tokenizer="tokenizer_2", tokenizer_class=T5_TOKENIZER),
        ),
        stated_inputs=_stated_kontext_inputs if references else _stated_inputs,
        read_sizes=_sizes,
        check=_check,
        sampling=Sampling(
            guidance=guidance,
            is_flow=True,
            flow_sigmas="linear",
            flow_shift="linear",
            patch_size=2,
            encodes_mode=references is not None,
        ),
        references=references,
        distilled_steps=8,
        default_side=1024,
        **rest,
    )


FLUX1 = (
    _flux1(
        "flux1-dev",
        "embedded",
        GUIDANCE,
        num_inference_steps=28,
        guidance_scale=3.5,
        read_card=lambda _, names: (28, 4.5) if "krea" in names.lower() else None,
    ),
    _flux1(
        "flux1-kontext",
        "embedded",
        GUIDANCE,
        *REFERENCES,
        references=_KONTEXT_REFERENCES,
        num_inference_steps=28,
        guidance_scale=2.5,  # of its model card; the pipeline's default is 3.5
    ),
    _flux1("flux1-schnell", "none", num_inference_steps=4, guidance_scale=1.0),
)
