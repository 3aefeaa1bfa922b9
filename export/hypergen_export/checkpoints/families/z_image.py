"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hypergen_export.checkpoints.components import Sizes
from hypergen_export.checkpoints.families.tensors import MASKED_HIDDEN_STATES, TEXT_MASK, transformer, vae
from hypergen_export.checkpoints.families.text_encoders import QWEN2_TOKENIZER, QWEN3_WITH_HEAD, qwen3, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, Sampling, TextInput

_MAX_TOKENS = 512  # of ZImagePipeline


def _sizes(configs: Configs) -> Sizes:
    text_encoder = configs.config("text_encoder")
    return {
        "vocabulary": int(text_encoder["vocab_size"]),
        "tokens": _MAX_TOKENS,
        "context_width": int(text_encoder["hidden_size"]),
        "latent_channels": int(configs.config("vae")["latent_channels"]),
        "time_width": 256,
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser = configs["transformer"]
    if denoiser.get("in_channels") != sizes["latent_channels"]:
        yield f"its transformer takes {denoiser.get('in_channels')} channels, its VAE gives {sizes['latent_channels']}"
    if list(denoiser.get("all_patch_size", [2])) != [2] or list(denoiser.get("all_f_patch_size", [1])) != [1]:
        yield "its transformer has other patches than 2 × 2"
    if denoiser.get("cap_feat_dim") != sizes["context_width"]:
        yield unread_features("transformer", denoiser.get("cap_feat_dim"), sizes)
    if float(denoiser.get("t_scale", 1000.0)) != 1000.0:
        yield f"its transformer scales timesteps by {denoiser.get('t_scale')}"
    if denoiser.get("siglip_feat_dim") is not None:
        yield "its transformer takes image features beside the prompt"


Z_IMAGE = (
    Family(
        name="z-image",
        pipelines=dict.fromkeys(("ZImagePipeline", "ZImageImg2ImgPipeline"), ConfigOverrides()),
        components=(
            qwen3("text_tokens", "z_image_text_encoder"),
            transformer("diffusers.ZImageTransformer2DModel", MASKED_HIDDEN_STATES, TEXT_MASK, wrapper="z_image"),
            *vae(wrapper="shifted"),
        ),
        text=(TextInput(encoder="text_encoder", tokenizer_class=QWEN2_TOKENIZER, chat={"enable_thinking": True}),),
        stated_inputs=lambda _: {"encoder_hidden_states", "text_mask"},
        read_sizes=_sizes,
        check=_check,
        sampling=Sampling(
            guidance="classifier_free_from_zero",
            is_flow=True,
            flow_sigmas="linear",
            flow_shift="linear",
            patch_size=2,
            reverses_time=True,
        ),
        num_inference_steps=50,
        guidance_scale=5.0,
        distilled_steps=8,
        default_side=1024,
        accepted_classes={"text_encoder": (QWEN3_WITH_HEAD,)},
    ),
)
