"""FLUX.2-klein, distilled and base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypergen_export.checkpoints.components import Sizes
from hypergen_export.checkpoints.families.tensors import HIDDEN_STATES, REFERENCES, transformer, vae
from hypergen_export.checkpoints.families.text_encoders import QWEN2_TOKENIZER, QWEN3_WITH_HEAD, qwen3, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, References, Sampling, TextInput

_MAX_TOKENS = 512  # of Flux2KleinPipeline
# The pipeline concatenates the hidden states of three layers, of which this is the last.
_LAST_LAYER = 27
# The pipeline takes any number; Black Forest Labs' own API of this model takes four.
_REFERENCES = References(count=4, pixels=1024 * 1024, position_step=10)


def _stated_inputs(config: Config) -> set[str]:
    guidance = {"guidance"} if config.get("guidance_embeds", True) else set[str]()
    return {"encoder_hidden_states", *(tensor.name for tensor in REFERENCES)} | guidance


def _sizes(configs: Configs) -> Sizes:
    text_encoder, denoiser = configs.config("text_encoder"), configs.config("transformer")
    return {
        "vocabulary": int(text_encoder["vocab_size"]),
        "tokens": _MAX_TOKENS,
        "context_width": 3 * int(text_encoder["hidden_size"]),
        "latent_channels": 4 * int(configs.config("vae")["latent_channels"]),
        "time_width": int(denoiser.get("timestep_guidance_channels", 256)),
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    denoiser, text_encoder = configs["transformer"], configs["text_encoder"]
    if denoiser.get("in_channels") != sizes["latent_channels"] or denoiser.get("patch_size", 1) != 1:
        yield f"its transformer takes {denoiser.get('in_channels')} channels, its VAE gives {sizes['latent_channels']}"
    if denoiser.get("joint_attention_dim") != sizes["context_width"]:
        yield unread_features("transformer", denoiser.get("joint_attention_dim"), sizes)
    if int(text_encoder["num_hidden_layers"]) <= _LAST_LAYER:
        yield f"its text encoder has {text_encoder['num_hidden_layers']} layers, and layer {_LAST_LAYER} is used"


def _klein(name: str, guidance: str, **rest: Any) -> Family:
    return Family(
        name=name,
        references=_REFERENCES,
        pipelines={"Flux2KleinPipeline": ConfigOverrides()},
        components=(
            qwen3("tokens", "flux2_text_encoder", layers=_LAST_LAYER),
            transformer("diffusers.Flux2Transformer2DModel", HIDDEN_STATES, *REFERENCES, wrapper="flux2"),
            *vae("diffusers.AutoencoderKLFlux2", "flux2"),
        ),
        # Padding is masked in the text encoder, but attended to in the transformer.
        text=(TextInput(encoder="text_encoder", tokenizer_class=QWEN2_TOKENIZER, chat={"enable_thinking": False}),),
        stated_inputs=_stated_inputs,
        read_sizes=_sizes,
        check=_check,
        sampling=Sampling(
            guidance=guidance,
            is_flow=True,
            flow_sigmas="linear",
            flow_shift="empirical",
            latent_patch_size=2,
            encodes_mode=True,
        ),
        default_side=1024,
        accepted_classes={"text_encoder": (QWEN3_WITH_HEAD,)},
        **rest,
    )


FLUX2 = (
    _klein(
        "flux2-klein",
        "none",
        is_named_by=lambda index: bool(index.get("is_distilled")),
        num_inference_steps=4,
        guidance_scale=1.0,
    ),
    _klein(
        "flux2-klein-base",
        "classifier_free",
        is_named_by=lambda index: not index.get("is_distilled"),
        num_inference_steps=50,
        guidance_scale=4.0,
    ),
)
