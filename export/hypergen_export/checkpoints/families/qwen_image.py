"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from hypergen_export.checkpoints.components import Component, Sizes
from hypergen_export.checkpoints.families.tensors import (
    MASKED_HIDDEN_STATES,
    TEXT_MASK,
    TOLERANCE,
    attention_mask,
    input_ids,
    transformer,
    vae,
)
from hypergen_export.checkpoints.families.text_encoders import QWEN2_TOKENIZER, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, Sampling, TextInput

# Of QwenImagePipeline: the prompt's tokens, its template, and the tokens before the prompt.
_MAX_TOKENS = 512
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_TEMPLATE_TOKENS = 34

_QWEN2_5_VL = Component(
    name="text_encoder",
    module="text_encoder",
    loader="transformers.Qwen2_5_VLForConditionalGeneration",
    wrapper="qwen_image_text_encoder",
    inputs=(input_ids("templated_tokens", "prompt"), attention_mask("templated_tokens")),
    outputs=(MASKED_HIDDEN_STATES,),
    tolerance=TOLERANCE,
    unused=("visual.", "lm_head."),
    is_typed=True,
    kept_layers={"language_model.layers": (0, 1), "visual.blocks": (0,)},
)
# Its convolutions are cut to the last slice, which the wrapper computes.
_VAE = tuple(
    replace(component, computed_with=("",)) for component in vae("diffusers.AutoencoderKLQwenImage", "qwen_image")
)


def _language(text_encoder: Config) -> Config:
    """The config of the language model; older versions of transformers wrote it flat."""
    language: Config = text_encoder.get("text_config", text_encoder)
    return language


def _sizes(configs: Configs) -> Sizes:
    language = _language(configs.config("text_encoder"))
    return {
        "vocabulary": int(language["vocab_size"]),
        "tokens": _MAX_TOKENS,
        "template_tokens": _TEMPLATE_TOKENS,
        "encoder_tokens": _TEMPLATE_TOKENS + _MAX_TOKENS,
        "context_width": int(language["hidden_size"]),
        "latent_channels": int(configs.config("vae").get("z_dim", 16)),
        "time_width": 256,
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser = configs["transformer"]
    channels = 4 * sizes["latent_channels"]
    if denoiser.get("patch_size", 2) != 2 or denoiser.get("in_channels", 64) != channels:
        yield f"its transformer takes {denoiser.get('in_channels')} channels per token, its VAE gives {channels}"
    if (width := denoiser.get("joint_attention_dim", 3584)) != sizes["context_width"]:
        yield unread_features("transformer", width, sizes)
    for option in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if denoiser.get(option):
            yield f"its transformer has the option {option}"


QWEN_IMAGE = (
    Family(
        name="qwen-image",
        pipelines=dict.fromkeys(
            ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"), ConfigOverrides()
        ),
        components=(
            _QWEN2_5_VL,
            transformer("diffusers.QwenImageTransformer2DModel", MASKED_HIDDEN_STATES, TEXT_MASK, wrapper="qwen_image"),
            *_VAE,
        ),
        text=(
            TextInput(
                encoder="text_encoder", tokenizer_class=QWEN2_TOKENIZER, tokens="encoder_tokens", template=_TEMPLATE
            ),
        ),
        stated_inputs=lambda _: {"encoder_hidden_states", "text_mask"},
        read_sizes=_sizes,
        check=_check,
        vae_levels=lambda vae: len(vae.get("temperal_downsample", (False, True, True))) + 1,
        sampling=Sampling(
            guidance="classifier_free_renormed",
            is_flow=True,
            flow_sigmas="linear",
            flow_shift="linear",
            patch_size=2,
        ),
        num_inference_steps=50,
        guidance_scale=4.0,
        distilled_steps=8,  # of Qwen-Image-Lightning, whose other version has 4 in its name
        default_side=1024,
    ),
)
