"""Families with a UNet: Stable Diffusion 1.x, 2.x and XL, and latent consistency models of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hypergen_export.checkpoints.components import FLOAT, INT, QUANTIZED, WEIGHTS_ONLY, Component, Sizes, Tensor
from hypergen_export.checkpoints.families.tensors import (
    HIDDEN_STATES,
    IMAGE_LATENTS,
    MODEL_OUTPUT,
    POOLED,
    SAMPLE,
    TIME,
    TOLERANCE,
    attention_mask,
    input_ids,
    vae,
)
from hypergen_export.checkpoints.families.text_encoders import clip_tokens, unread_features
from hypergen_export.checkpoints.family import Config, ConfigOverrides, Configs, Family, Sampling, TextInput

# Of all chunks of a prompt.
_JOINED_STATES = replace(HIDDEN_STATES, axes=("text_tokens", "context_width"))
_GUIDANCE = Tensor(name="timestep_cond", dtype=FLOAT, axes=("guidance_width",))
_SIZES = Tensor(name="size_embeds", dtype=FLOAT, axes=("sizes_width",), example="sinusoids")
_DEEP = Tensor(name="deep_features", dtype=FLOAT, axes=("deep_channels", "latent_height", "latent_width"))

_MASKED_IMAGE = Tensor(name="masked_image", dtype=FLOAT, axes=("masked_channels", "latent_height", "latent_width"))

_DEFAULT_CONTEXT_WIDTH = 1280  # the default of UNet2DConditionModel
# Input channels of a UNet with four latent channels -> what the additional channels contain.
_CHANNELS = {
    5: "a depth map",
    7: "an image to upscale",
}
# With four latent channels: beside the latents a mask and the latents of the masked image.
_INPAINTING_CHANNELS = 9
# Likewise, beside the latents those of the image that is edited by instruction.
_EDITING_CHANNELS = 8


# The layers of a UNet that eight bits cost most, measured on the shipped model: the convolutions beside residual blocks
# read values that no normalisation bounds, and alone make the output of the last step 20 % wrong; the first convolution
# makes it 9 % wrong. The other ones are little work, and all blocks depend on them.
_UNQUANTIZED = (
    r"conv_in\.",
    r"conv_out\.",
    r".*\.conv_shortcut\.",
    r"time_embedding\.",
    r"add_embedding\.",
    r".*\.time_emb_proj\.",
)
# So many layers before the one that is used by default give the hidden states.
_CLIP_SKIP = Tensor(name="clip_skip", dtype=INT, axes=(1,), example="clip_skip")


def _states_of(width: str) -> Tensor:
    """One text encoder's hidden states."""
    return Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", width))


def _unet(*conditions: Tensor) -> Component:
    return Component(
        name="unet",
        module="unet",
        loader="diffusers.UNet2DConditionModel",
        inputs=(SAMPLE, TIME, *conditions),
        outputs=(MODEL_OUTPUT,),
        tolerance=TOLERANCE,
        kept_layers={"down_blocks": (0, 1), "up_blocks": (-2, -1)},
        # Pipelines that inpaint or edit need input images, of which there are none to calibrate with.
        quantized=WEIGHTS_ONLY if {_MASKED_IMAGE, IMAGE_LATENTS} & {*conditions} else QUANTIZED,
        unquantized=_UNQUANTIZED,
    )


def with_deep_cache(components: tuple[Component, ...]) -> tuple[Component, ...]:
    """The components for DeepCache (Ma et al., 2023), which only UNets have.

    The UNet also outputs its deep features, and a shallow UNet takes earlier ones as an input. Cut at the
    first branch: everything but the last layer of the last block is deep. Components without a UNet stay as they are.
    """
    unet = next((component for component in components if component.name == "unet"), None)
    if unet is None:
        return components
    exporting = replace(unet, wrapper="feature_exporting_unet", outputs=(*unet.outputs, _DEEP))
    shallow = replace(unet, name="unet_shallow", inputs=(*unet.inputs, _DEEP))
    return (*(exporting if component is unet else component for component in components), shallow)


_CLIP = Component(
    name="text_encoder",
    module="text_encoder",
    loader="transformers.CLIPTextModel",
    inputs=(input_ids("tokens", "prompt"), attention_mask("tokens"), _CLIP_SKIP),
    outputs=(_states_of("text_width"),),
    tolerance=TOLERANCE,
)
_TEXT_ENCODERS_XL = (
    replace(_CLIP, wrapper="penultimate_text_encoder"),
    Component(
        name="text_encoder_2",
        module="text_encoder_2",
        loader="transformers.CLIPTextModelWithProjection",
        wrapper="pooled_text_encoder",
        inputs=(input_ids("tokens", "prompt_2"), attention_mask("tokens"), _CLIP_SKIP),
        outputs=(_states_of("text_width_2"), POOLED),
        tolerance=TOLERANCE,
        kept_layers={"encoder.layers": (0, -1)},
    ),
)


# diffusers' XL pipeline also decodes in float32 ("make sure the VAE is in float32 mode, as it overflows"). It is the
# only one of these pipelines that uses a mean and a standard deviation per latent channel.
def _vae_xl(*, encoder: str = "per_channel", masked: bool = False) -> tuple[Component, ...]:
    components = vae(wrapper="per_channel", encoder=encoder, masked=masked)
    return tuple(replace(each, overflows_float16=True) for each in components)


STABLE_DIFFUSION = (_CLIP, _unet(_JOINED_STATES), *vae())
LATENT_CONSISTENCY = (_CLIP, _unet(_JOINED_STATES, _GUIDANCE), *vae())
STABLE_DIFFUSION_XL = (*_TEXT_ENCODERS_XL, _unet(_JOINED_STATES, POOLED, _SIZES), *_vae_xl())
LATENT_CONSISTENCY_XL = (*_TEXT_ENCODERS_XL, _unet(_JOINED_STATES, POOLED, _SIZES, _GUIDANCE), *_vae_xl())
STABLE_DIFFUSION_INPAINTING = (_CLIP, _unet(_JOINED_STATES, _MASKED_IMAGE), *vae(masked=True))
INSTRUCT_PIX2PIX = (_CLIP, _unet(_JOINED_STATES, IMAGE_LATENTS), *vae(encoder="unscaled"))
STABLE_DIFFUSION_XL_INPAINTING = (
    *_TEXT_ENCODERS_XL,
    _unet(_JOINED_STATES, POOLED, _SIZES, _MASKED_IMAGE),
    *_vae_xl(masked=True),
)
INSTRUCT_PIX2PIX_XL = (
    *_TEXT_ENCODERS_XL,
    _unet(_JOINED_STATES, POOLED, _SIZES, IMAGE_LATENTS),
    *_vae_xl(encoder="unscaled"),
)

# 1,200 tokens of CLIP: TensorRT wants a bound, and with this one cross-attention is smaller than self-attention.
_MAX_CHUNKS = 16
_TEXT = (TextInput(encoder="text_encoder", max_chunks=_MAX_CHUNKS),)
# Both read the same positions; their hidden states are concatenated along the features.
_TEXT_XL = (*_TEXT, TextInput(encoder="text_encoder_2", tokenizer="tokenizer_2", max_chunks=_MAX_CHUNKS))


def _stated_inputs(unet: Config) -> set[str]:
    """A UNet's inputs beside latents and timestep, according to its config."""
    kind = unet.get("addition_embed_type")
    # "text" is pooled from encoder_hidden_states inside the UNet and needs no input of its own.
    added = {None: set[str](), "text": set[str](), "text_time": {"text_embeds", "size_embeds"}}
    guidance = {"timestep_cond"} if unet.get("time_cond_proj_dim") is not None else set[str]()
    channels = {_INPAINTING_CHANNELS: {"masked_image"}, _EDITING_CHANNELS: {"image_latents"}}
    images = channels.get(unet.get("in_channels", 0), set[str]())
    return {"encoder_hidden_states"} | guidance | images | added.get(kind, {f"added conditions ({kind})"})


def _sizes(configs: Configs) -> Sizes:
    text_encoder, unet = configs.config("text_encoder"), configs.config("unet")
    width = int(unet["block_out_channels"][0])
    stated = {"guidance_width": unet["time_cond_proj_dim"]} if unet.get("time_cond_proj_dim") is not None else {}
    return {
        "vocabulary": int(text_encoder["vocab_size"]),
        "text_width": int(text_encoder["hidden_size"]),
        "context_width": int(text_encoder["hidden_size"]),
        "tokens": clip_tokens(configs, "tokenizer", text_encoder),
        "max_clip_skip": int(text_encoder["num_hidden_layers"]),
        "latent_channels": int(configs.config("vae")["latent_channels"]),
        "masked_channels": int(configs.config("vae")["latent_channels"]) + 1,
        "deep_channels": width,
        "time_width": width,
        # Six numbers are embedded one by one: original height and width, two crop offsets, target height and width.
        "sizes_width": 6 * int(unet.get("addition_time_embed_dim") or 0),
        **stated,
    }


def _sizes_xl(configs: Configs) -> Sizes:
    first, text_encoder = _sizes(configs), configs.config("text_encoder_2")
    return {
        **first,
        "vocabulary_2": int(text_encoder["vocab_size"]),
        "text_width_2": int(text_encoder["hidden_size"]),
        "pooled_width": int(text_encoder["projection_dim"]),
        # The default is the last layer but one.
        "max_clip_skip": min(first["max_clip_skip"], int(text_encoder["num_hidden_layers"])) - 1,
        "context_width": first["text_width"] + int(text_encoder["hidden_size"]),
        "tokens": min(first["tokens"], clip_tokens(configs, "tokenizer_2", text_encoder)),
    }


def _check(configs: Mapping[str, Config], sizes: Sizes) -> Iterator[str]:
    """The reasons why the components' inputs do not suffice."""
    unet = configs["unet"]
    encoders = [config for module, config in configs.items() if module.startswith("text_encoder")]
    given, expected = unet.get("in_channels"), sizes["latent_channels"]
    if given not in (expected, 2 * expected, expected + sizes["masked_channels"]):
        carried = f" ({_CHANNELS[given]})" if given in _CHANNELS else ""
        yield f"its UNet takes {given} channels{carried}, its VAE gives {expected}"
    if unet.get("time_embedding_type", "positional") != "positional":
        yield f"its UNet uses another timestep embedding ({unet.get('time_embedding_type')})"
    if unet.get("class_embed_type") is not None or unet.get("num_class_embeds"):
        yield "its UNet needs a class label"
    if unet.get("encoder_hid_dim") is not None or unet.get("encoder_hid_dim_type") is not None:
        yield "its UNet projects the encoder's hidden states (encoder_hid_dim)"
    if _context_widths(unet) != {sizes["context_width"]}:
        yield unread_features("UNet", unet.get("cross_attention_dim"), sizes)
    if _size_numbers(unet, sizes) not in (None, 6):
        yield "its UNet takes other size conditioning than six numbers"
    if any(config.get("use_attention_mask") for config in encoders):
        yield "its text encoder needs an attention mask"


def _context_widths(unet: Config) -> set[Any]:
    widths = unet.get("cross_attention_dim", _DEFAULT_CONTEXT_WIDTH)
    return set(widths) if isinstance(widths, list) else {widths}


def _size_numbers(unet: Config, sizes: Sizes) -> float | None:
    """The number of time ids that the UNet embeds; None if it has no such input."""
    if "pooled_width" not in sizes:
        return None
    width = int(unet.get("projection_class_embeddings_input_dim") or 0)
    return (width - sizes["pooled_width"]) / int(unet.get("addition_time_embed_dim") or 1)


# Of StableDiffusionPipeline and StableDiffusionInpaintPipeline. The pipelines of latent consistency models and of XL
# change nothing, but inpainting with a latent consistency model uses StableDiffusionInpaintPipeline.
_OVERRIDES_SD = ConfigOverrides(
    scheduler={"steps_offset": 1, "clip_sample": False},
    inpainting={"skip_prk_steps": True},
    min_legacy_sample_size=64,
)
_OVERRIDES_LCM = ConfigOverrides(inpainting={"steps_offset": 1, "skip_prk_steps": True})
# A checkpoint saved from an image-to-image pipeline has the same components; its index names another class.
_PIPELINES = dict.fromkeys(
    ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"), _OVERRIDES_SD
)
_PIPELINES_LCM = dict.fromkeys(
    ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"), _OVERRIDES_LCM
)
_PIPELINES_XL = dict.fromkeys(
    ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    ConfigOverrides(),
)
_EDITING = Sampling(guidance="classifier_free_with_image")

# 1.x, 2.x, SD-Turbo, and LCM and TCD models without a guidance embedding are one family: their configs, weights and
# schedulers differ, their tensors do not. The same holds for XL, XL-Turbo and XL-Lightning.
UNETS = (
    Family(
        name="stable-diffusion",
        pipelines=_PIPELINES,
        components=STABLE_DIFFUSION,
        text=_TEXT,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes,
        check=_check,
        num_inference_steps=50,
        guidance_scale=7.5,
    ),
    Family(
        name="stable-diffusion-inpainting",
        pipelines=_PIPELINES,
        components=STABLE_DIFFUSION_INPAINTING,
        text=_TEXT,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes,
        check=_check,
        num_inference_steps=50,
        guidance_scale=7.5,
    ),
    Family(
        name="instruct-pix2pix",
        pipelines={"StableDiffusionInstructPix2PixPipeline": ConfigOverrides()},
        components=INSTRUCT_PIX2PIX,
        text=_TEXT,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes,
        check=_check,
        sampling=_EDITING,
        num_inference_steps=100,
        guidance_scale=7.5,
    ),
    Family(
        name="latent-consistency",
        pipelines=_PIPELINES | _PIPELINES_LCM,
        components=LATENT_CONSISTENCY,
        text=_TEXT,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes,
        check=_check,
        sampling=Sampling(guidance="embedded"),
        num_inference_steps=4,
        guidance_scale=8.5,
    ),
    Family(
        name="stable-diffusion-xl",
        pipelines=_PIPELINES_XL,
        components=STABLE_DIFFUSION_XL,
        text=_TEXT_XL,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes_xl,
        check=_check,
        num_inference_steps=50,
        guidance_scale=5.0,
    ),
    Family(
        name="stable-diffusion-xl-inpainting",
        pipelines=_PIPELINES_XL,
        components=STABLE_DIFFUSION_XL_INPAINTING,
        text=_TEXT_XL,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes_xl,
        check=_check,
        num_inference_steps=50,
        guidance_scale=7.5,
    ),
    Family(
        name="instruct-pix2pix-xl",
        pipelines={"StableDiffusionXLInstructPix2PixPipeline": ConfigOverrides()},
        components=INSTRUCT_PIX2PIX_XL,
        text=_TEXT_XL,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes_xl,
        check=_check,
        sampling=_EDITING,
        is_named_by=lambda index: not index.get("is_cosxl_edit"),
        num_inference_steps=100,
        guidance_scale=5.0,
    ),
    Family(
        name="latent-consistency-xl",
        pipelines=_PIPELINES_XL,
        components=LATENT_CONSISTENCY_XL,
        text=_TEXT_XL,
        stated_inputs=_stated_inputs,
        read_sizes=_sizes_xl,
        check=_check,
        sampling=Sampling(guidance="embedded"),
        num_inference_steps=4,
        guidance_scale=8.5,
    ),
)
