"""Model families as data: the components of each, their tensors, schedulers' overrides and defaults.

A new family is a new row of FAMILIES, a new input a new `Tensor`. Does not import torch; loading and conversion are in
other modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hypergen_export.checkpoints.lora import Lora

FLOAT, INT, BYTE = "FP32", "INT32", "UINT8"

# Axes that vary between requests. Every other name in `Tensor.axes` is fixed by the checkpoint (`Sizes`).
FREE_AXES = frozenset({"height", "width", "latent_height", "latent_width"})

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output, without its leading batch axis.

    `axes` holds names of sizes or plain numbers. `example` is the key of `examples.VALUES` that generates realistic
    values for tracing and comparison.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    example: str = "normal"

    def dims(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape for Triton: -1 for a free axis."""
        return tuple(-1 if axis in FREE_AXES else self._size(axis, sizes) for axis in self.axes)

    def shape(self, sizes: Sizes, *, batch: int, height: int, width: int) -> tuple[int, ...]:
        """The shape for `batch` samples whose latents are `height` × `width`."""
        factor = sizes["vae_scale_factor"]
        free = {
            "latent_height": height,
            "latent_width": width,
            "height": height * factor,
            "width": width * factor,
        }
        return (batch, *(self._size(axis, {**sizes, **free}) for axis in self.axes))

    def free_axes(self) -> dict[int, str]:
        """Position (counting the batch axis) and name of each axis that may change between calls."""
        named = {i: axis for i, axis in enumerate(self.axes, start=1) if axis in FREE_AXES}
        return {0: "batch", **{i: str(axis) for i, axis in named.items()}}

    @staticmethod
    def _size(axis: str | int, sizes: Sizes) -> int:
        return axis if isinstance(axis, int) else sizes[axis]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model of the Triton repository.

    `module` is the checkpoint's subfolder, `loader` its class ("library.Class"). `tolerance` bounds the largest
    difference from torch, relative to the largest magnitude if that exceeds one; for UINT8 it is absolute. `wrapper`
    is a key of `wrappers.WRAPPERS`, empty if it equals the component's name. `overflows_float16`: intermediate values
    exceed float16's range, so this component is computed in float32 when the others are computed in float16.
    `lora` is merged into the module's weights.
    """

    name: str
    module: str
    loader: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float
    wrapper: str = ""
    overflows_float16: bool = False
    lora: Lora | None = None

    @property
    def is_denoiser(self) -> bool:
        """Whether this component takes the denoising steps."""
        return self.inputs[0].name == "sample"

    def with_lora(self, lora: Lora) -> Component:
        """This component with the LoRA merged, as a further model of the repository."""
        return replace(self, name=f"{self.name}.{lora.label}", wrapper=self.wrapper or self.name, lora=lora)

    def weights_dtype(self, dtype: str) -> str:
        """The precision of this component in an export in `dtype`."""
        return "float32" if self.overflows_float16 and dtype == "float16" else dtype


_LATENTS = ("latent_channels", "latent_height", "latent_width")
_IMAGE = Tensor(name="image", dtype=BYTE, axes=("height", "width", 3), example="pixel")
# Float32 against float32: engines sum in another order. 1e-3 is far above the resulting difference (1e-6 to 1e-5 on
# the models tried) and far below that of a wrong operator, axis or weight.
_TOLERANCE = 1e-3

# A denoiser's conditioning inputs, by diffusers' names.
_HIDDEN_STATES = Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", "context_width"))
_GUIDANCE = Tensor(name="timestep_cond", dtype=FLOAT, axes=("guidance_width",))
_POOLED = Tensor(name="text_embeds", dtype=FLOAT, axes=("pooled_width",))
_SIZES = Tensor(name="size_embeds", dtype=FLOAT, axes=("sizes_width",), example="sinusoids")
_DEEP = Tensor(name="deep_features", dtype=FLOAT, axes=("deep_channels", "latent_height", "latent_width"))


def _input_ids(example: str) -> Tensor:
    return Tensor(name="input_ids", dtype=INT, axes=("tokens",), example=example)


def _states_of(width: str) -> Tensor:
    """One text encoder's hidden states; those of several encoders are concatenated along the last axis."""
    return Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", width))


def _unet(*conditions: Tensor) -> Component:
    return Component(
        name="unet",
        module="unet",
        loader="diffusers.UNet2DConditionModel",
        inputs=(
            Tensor(name="sample", dtype=FLOAT, axes=_LATENTS),
            Tensor(name="time", dtype=FLOAT, axes=("time_width",), example="time"),
            *conditions,
        ),
        outputs=(Tensor(name="model_output", dtype=FLOAT, axes=_LATENTS),),
        tolerance=_TOLERANCE,
    )


def with_deep_cache(components: tuple[Component, ...]) -> tuple[Component, ...]:
    """The components for DeepCache (Ma et al., 2023), which only UNets have.

    The UNet also outputs its deep features, and a shallow UNet takes earlier ones as an input. Cut at the
    first branch: everything but the last layer of the last block is deep.
    """
    (unet,) = (component for component in components if component.name == "unet")
    exporting = replace(unet, wrapper="feature_exporting_unet", outputs=(*unet.outputs, _DEEP))
    shallow = replace(unet, name="unet_shallow", inputs=(*unet.inputs, _DEEP))
    return (*(exporting if component is unet else component for component in components), shallow)


_CLIP = Component(
    name="text_encoder",
    module="text_encoder",
    loader="transformers.CLIPTextModel",
    inputs=(_input_ids("prompt"),),
    outputs=(_states_of("text_width"),),
    tolerance=_TOLERANCE,
)
_TEXT_ENCODERS_XL = (
    replace(_CLIP, wrapper="penultimate_text_encoder"),
    Component(
        name="text_encoder_2",
        module="text_encoder_2",
        loader="transformers.CLIPTextModelWithProjection",
        wrapper="pooled_text_encoder",
        inputs=(_input_ids("prompt_2"),),
        outputs=(_states_of("text_width_2"), _POOLED),
        tolerance=_TOLERANCE,
    ),
)
_VAE = (
    Component(
        name="vae_decoder",
        module="vae",
        loader="diffusers.AutoencoderKL",
        inputs=(Tensor(name="latents", dtype=FLOAT, axes=_LATENTS),),
        outputs=(_IMAGE,),
        tolerance=1.0,  # one level of 255, as rounding may differ
    ),
    Component(
        name="vae_encoder",
        module="vae",
        loader="diffusers.AutoencoderKL",
        inputs=(_IMAGE,),
        outputs=(
            Tensor(name="mean", dtype=FLOAT, axes=_LATENTS),
            Tensor(name="std", dtype=FLOAT, axes=_LATENTS),
        ),
        tolerance=_TOLERANCE,
    ),
)
# diffusers' XL pipeline also decodes in float32 ("make sure the VAE is in float32 mode, as it overflows"). It is the
# only one of these pipelines that uses a mean and a standard deviation per latent channel.
_VAE_XL = tuple(
    replace(component, wrapper=f"{component.name}_per_channel", overflows_float16=True) for component in _VAE
)

STABLE_DIFFUSION = (_CLIP, _unet(_HIDDEN_STATES), *_VAE)
LATENT_CONSISTENCY = (_CLIP, _unet(_HIDDEN_STATES, _GUIDANCE), *_VAE)
STABLE_DIFFUSION_XL = (*_TEXT_ENCODERS_XL, _unet(_HIDDEN_STATES, _POOLED, _SIZES), *_VAE_XL)
LATENT_CONSISTENCY_XL = (*_TEXT_ENCODERS_XL, _unet(_HIDDEN_STATES, _POOLED, _SIZES, _GUIDANCE), *_VAE_XL)


@dataclass(frozen=True, kw_only=True)
class ConfigOverrides:
    """Changes that a pipeline's constructor makes in the configs that it loads; absent entries stay absent.

    `scheduler` applies to the scheduler's config, `inpainting` also, in the inpainting pipeline. A UNet saved by
    diffusers before 0.9 has a `sample_size` of at least `min_legacy_sample_size`: older versions stated it wrongly.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    inpainting: Mapping[str, Any] = field(default_factory=dict)
    min_legacy_sample_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints that are served by the same components.

    `pipelines` maps diffusers' class names to the config overrides of each; families that share a pipeline differ in
    the denoiser's config. `sizes` maps a size to the module and the key of its config.json. `tokenizers` are
    subfolders, one for each text encoder. `num_inference_steps` and `guidance_scale` are the defaults of diffusers'
    pipeline, for checkpoints that are not distilled.
    """

    name: str
    pipelines: Mapping[str, ConfigOverrides]
    components: tuple[Component, ...]
    sizes: Mapping[str, tuple[str, str]]
    num_inference_steps: int
    guidance_scale: float
    tokenizers: tuple[str, ...] = ("tokenizer",)

    @property
    def modules(self) -> dict[str, str]:
        """Subfolder of the checkpoint -> its class."""
        return {component.module: component.loader for component in self.components}

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The text encoders, in the order in which their hidden states are concatenated."""
        return tuple(component for component in self.components if component.inputs[0].name == "input_ids")

    @property
    def denoiser(self) -> Component:
        """The component that takes the steps, named after the checkpoint's subfolder: `unet`."""
        (denoiser,) = (component for component in self.components if component.is_denoiser)
        return denoiser

    @property
    def denoiser_inputs(self) -> tuple[str, ...]:
        """The denoiser's inputs beside latents and timestep."""
        return tuple(tensor.name for tensor in self.denoiser.inputs if tensor.name not in ("sample", "time"))


_SIZES_SD = {
    "vocabulary": ("text_encoder", "vocab_size"),
    "text_width": ("text_encoder", "hidden_size"),
    "latent_channels": ("vae", "latent_channels"),
}
_SIZES_XL = {
    **_SIZES_SD,
    "vocabulary_2": ("text_encoder_2", "vocab_size"),
    "text_width_2": ("text_encoder_2", "hidden_size"),
    "pooled_width": ("text_encoder_2", "projection_dim"),
}
_SIZES_LCM = {"guidance_width": ("unet", "time_cond_proj_dim")}

# Of StableDiffusionPipeline and StableDiffusionInpaintPipeline. The pipelines of latent consistency models and of XL
# change nothing, but inpainting with a latent consistency model uses StableDiffusionInpaintPipeline.
_OVERRIDES_SD = ConfigOverrides(
    scheduler={"steps_offset": 1, "clip_sample": False},
    inpainting={"skip_prk_steps": True},
    min_legacy_sample_size=64,
)
_OVERRIDES_LCM = ConfigOverrides(inpainting={"steps_offset": 1, "skip_prk_steps": True})
# A checkpoint saved from an image-to-image pipeline has the same components; its index names another class.
_PIPELINES = dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"), _OVERRIDES_SD)
_PIPELINES_LCM = dict.fromkeys(
    ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"), _OVERRIDES_LCM
)
_PIPELINES_XL = dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), ConfigOverrides())

# 1.x, 2.x, SD-Turbo, and LCM and TCD models without a guidance embedding are one family: their configs, weights and
# schedulers differ, their tensors do not. The same holds for XL, XL-Turbo and XL-Lightning.
FAMILIES = (
    Family(
        name="stable-diffusion",
        pipelines=_PIPELINES,
        components=STABLE_DIFFUSION,
        sizes=_SIZES_SD,
        num_inference_steps=50,
        guidance_scale=7.5,
    ),
    Family(
        name="latent-consistency",
        pipelines=_PIPELINES | _PIPELINES_LCM,
        components=LATENT_CONSISTENCY,
        sizes={**_SIZES_SD, **_SIZES_LCM},
        num_inference_steps=4,
        guidance_scale=8.5,
    ),
    Family(
        name="stable-diffusion-xl",
        pipelines=_PIPELINES_XL,
        components=STABLE_DIFFUSION_XL,
        sizes=_SIZES_XL,
        num_inference_steps=50,
        guidance_scale=5.0,
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
    Family(
        name="latent-consistency-xl",
        pipelines=_PIPELINES_XL,
        components=LATENT_CONSISTENCY_XL,
        sizes={**_SIZES_XL, **_SIZES_LCM},
        num_inference_steps=4,
        guidance_scale=8.5,
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
)
