"""Which model a single file holds, from the names and shapes of its tensors, and what its weights do not say about it.

The values are those of the configs that diffusers itself takes for each kind (`DIFFUSERS_DEFAULT_PIPELINE_PATHS`):
facts about stable-diffusion-v1-5, stabilityai's stable-diffusion-2-1 and stable-diffusion-xl-base-1.0, and the
inpainting models. What the weights do say, widths and depths, is read from them (`configs.py`), so that pruned models
such as SSD-1B are served, too. Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hypergen_export.errors import NotADiffusersPipelineError, UnsupportedModelError

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]

EPSILON, VELOCITY = "epsilon", "v_prediction"
PREDICTION_TYPES = (EPSILON, VELOCITY)
UNET = "model.diffusion_model."
# The UNet's own parts. Beside them, files have markers of what it predicts.
_OF_UNET = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
_CONV_IN = f"{UNET}input_blocks.0.0.weight"
_END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """A text encoder of a kind. `prefix` is its tensors' in the file; `is_open_clip`: by OpenCLIP's names there.

    `layers`: how many of its layers the model was trained with, where that may be fewer than a file has.
    """

    module: str
    tokenizer: str
    prefix: str
    is_open_clip: bool
    has_projection: bool = False
    layers: int | None = None
    pad_token: str = _END


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a model: its class as "transformers.Class", and its config."""

    loader: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A base model: `title` for people, and the entries of diffusers' configs that weights do not say."""

    title: str
    pipeline: str
    text_encoders: tuple[ClipEncoder, ...]
    scheduler: Mapping[str, Any]
    scaling_factor: float
    side: int
    index: Mapping[str, Any] = field(default_factory=dict)
    force_upcast: bool = False


_CLIP_L = ClipEncoder(
    module="text_encoder", tokenizer="tokenizer", prefix="cond_stage_model.transformer.", is_open_clip=False
)
_OPEN_CLIP_H = ClipEncoder(
    module="text_encoder",
    tokenizer="tokenizer",
    prefix="cond_stage_model.model.",
    is_open_clip=True,
    # Of 24: Stable Diffusion 2.x reads what the last but one gives.
    layers=23,
    pad_token="!",
)
_CLIP_L_XL = replace(_CLIP_L, prefix="conditioner.embedders.0.transformer.")
_OPEN_CLIP_G = ClipEncoder(
    module="text_encoder_2",
    tokenizer="tokenizer_2",
    prefix="conditioner.embedders.1.model.",
    is_open_clip=True,
    has_projection=True,
    pad_token="!",
)
_SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": EPSILON,
}
_PNDM = {**_SCHEDULER, "_class_name": "PNDMScheduler"}
_DDIM = {**_SCHEDULER, "_class_name": "DDIMScheduler"}
_EULER = {
    **_SCHEDULER,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD_1 = Kind(
    title="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    text_encoders=(_CLIP_L,),
    scheduler=_PNDM,
    scaling_factor=0.18215,
    side=512,
    index={"requires_safety_checker": False},
)
SD_2 = replace(SD_1, title="Stable Diffusion 2.x", text_encoders=(_OPEN_CLIP_H,), scheduler=_DDIM)
SDXL = Kind(
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    text_encoders=(_CLIP_L_XL, _OPEN_CLIP_G),
    scheduler=_EULER,
    scaling_factor=0.13025,
    side=1024,
    index={"force_zeros_for_empty_prompt": True},
    force_upcast=True,
)
# Channels of a UNet that takes more than four of latents -> what its kind is called, and its pipeline's class.
_WITH_IMAGE = {
    8: ("editing by instruction", "InstructPix2PixPipeline"),
    9: ("inpainting", "InpaintPipeline"),
}
# Number of the UNet's input channels -> why it is not supported.
_OTHER_CHANNELS = {
    5: "its UNet takes a depth map",
    7: "it is an upscaler, such as Stable Diffusion's x4",
}
_REFINER_CONTEXT = 1280
# Name of a tensor -> what a file with it is, and what to do.
_OTHERS = {
    r"lora_(unet|te|te1|te2|transformer)_.*|.*\.lora_(A|B|up|down)\..*": "it is a LoRA: pass it with --lora",
    r"control_model\..*|controlnet_.*|input_hint_block\..*": "it is a ControlNet, which is not supported",
    r"emb_params|string_to_param": "it is a textual inversion, not a model",
    r"(encoder|decoder)\.(conv_in|down|up|mid)[._].*": "it is a VAE, not a whole model: see --vae",
    r"((text_model\.)?encoder\.layers|encoder\.block|model\.layers|(enc\.)?blk)\.\d+\..*": (
        "it is a text encoder, not a whole model: see --text-encoder"
    ),
    r"(model\.diffusion_model\.)?(double_blocks|joint_blocks|transformer_blocks|layers|noise_refiner)\.\d+\..*": (
        "it is a transformer alone: pass the folder of its pipeline with --text-encoder; of parts that are given as "
        "files it needs the configs and tokenizers, not the weights"
    ),
    r"(down_blocks|up_blocks|mid_block)\..*": "it is one module in diffusers' layout; give the pipeline's folder",
    r"edm_mean": "it is Playground v2.5, whose schedule (EDM) is not supported",
    r"edm_vpred\.sigma_max": "it is CosXL, whose schedule (EDM) is not supported",
}
_EDM = ("edm_mean", "edm_vpred.sigma_max")


def complete_names(given: Mapping[str, T]) -> dict[str, T]:
    """The same by the names that the trainer's own code gives tensors.

    Some merged files leave out a part of CLIP's, and files of a UNet alone its prefix.
    """
    # A ControlNet has such blocks, too, but no output.
    is_bare = {"input_blocks.0.0.weight", "out.2.weight"} <= given.keys()
    return {
        f"{UNET}{name}" if is_bare and _OF_UNET.match(name) else _complete_name(name): each
        for name, each in given.items()
    }


def _complete_name(name: str) -> str:
    text = _CLIP_L.prefix
    for part in ("embeddings.", "encoder.", "final_layer_norm."):
        if name.startswith(text + part):
            return f"{text}text_model.{name.removeprefix(text)}"
    return name


def kind_of(shapes: Shapes) -> Kind:
    """The kind of the file with these tensors.

    Raises NotADiffusersPipelineError for a file that is no model, UnsupportedModelError for one that is not served;
    both without the file's name.
    """
    if _CONV_IN not in shapes or any(name in shapes for name in _EDM):
        raise NotADiffusersPipelineError(_what_else(shapes))
    kind = _base(shapes)
    channels = shapes[_CONV_IN][1]
    if channels == 4:
        return kind
    if channels in _OTHER_CHANNELS:
        raise UnsupportedModelError(f"{_OTHER_CHANNELS[channels]}, which is not supported")
    if channels not in _WITH_IMAGE:
        raise UnsupportedModelError(f"its UNet takes {channels} channels, which is not supported")
    purpose, pipeline = _WITH_IMAGE[channels]
    return replace(
        kind, title=f"{kind.title} {purpose}", pipeline=f"{kind.pipeline.removesuffix('Pipeline')}{pipeline}"
    )


def _base(shapes: Shapes) -> Kind:
    attention = {name: shape for name, shape in shapes.items() if name.startswith(UNET) and ".attn2.to_k." in name}
    context = next(iter(attention.values()), (0, 0))[1]
    if f"{UNET}label_emb.0.0.weight" in shapes:
        is_refiner = "conditioner.embedders.0.model.text_projection" in shapes or context == _REFINER_CONTEXT
        if is_refiner:
            raise UnsupportedModelError(
                "it is SDXL's refiner, which finishes another model's image and takes an aesthetic score; refiners "
                "are not supported"
            )
        return SDXL
    projection = next((shape for name, shape in shapes.items() if name.endswith("1.proj_in.weight")), ())
    return SD_2 if len(projection) == 2 else SD_1


def _what_else(shapes: Shapes) -> str:
    for pattern, answer in _OTHERS.items():
        if any(re.fullmatch(pattern, name) for name in shapes):
            return answer
    example = next(iter(shapes), None)
    return f"it holds no model that is known (its first tensor is {example})" if example else "it holds no tensors"
