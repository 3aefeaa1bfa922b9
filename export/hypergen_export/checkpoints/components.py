"""What a family of checkpoints consists of: one row per component of the Triton repository.

It knows names, tensors, free axes, example values and tolerances, all as data and without torch, and nothing
of how a component is loaded or converted. A new family is a new row of FAMILIES; a new input is a new `Tensor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hypergen_export.checkpoints.lora import Lora

FLOAT, INT, BYTE = "FP32", "INT32", "UINT8"

# Axes that a request chooses. Every other name in `Tensor.axes` is fixed by the checkpoint (`Sizes`).
FREE_AXES = frozenset({"height", "width", "latent_height", "latent_width"})

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output without its leading batch axis.

    `axes` holds names of sizes or plain numbers. `example` says what values mean something to the component: a key of
    `examples.VALUES`.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    example: str = "normal"

    def dims(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape for Triton: -1 where a request decides."""
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
        """Position (the batch counted) and name of each axis that may change between calls."""
        named = {i: axis for i, axis in enumerate(self.axes, start=1) if axis in FREE_AXES}
        return {0: "batch", **{i: str(axis) for i, axis in named.items()}}

    @staticmethod
    def _size(axis: str | int, sizes: Sizes) -> int:
        return axis if isinstance(axis, int) else sizes[axis]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model of the repository.

    `module` is the checkpoint's subfolder, `loader` the class it must be ("library.Class"). `tolerance` bounds the
    largest difference to torch, relative to the largest magnitude where that exceeds one; for UINT8 it is absolute.
    `wrapper` is a key of `wrappers.WRAPPERS`, empty where that is the component's name. `overflows_float16`: values
    inside leave float16's range, so an engine must compute this one in float32, whatever it computes the others in.
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

    def with_lora(self, lora: Lora) -> Component:
        """The model that serves this component's pictures with the LoRA, beside this one."""
        return replace(self, name=f"{self.name}.{lora.label}", wrapper=self.wrapper or self.name, lora=lora)

    def weights_dtype(self, dtype: str) -> str:
        """What this component is computed in where `dtype` is asked for."""
        return "float32" if self.overflows_float16 and dtype == "float16" else dtype


_LATENTS = ("latent_channels", "latent_height", "latent_width")
_IMAGE = Tensor(name="image", dtype=BYTE, axes=("height", "width", 3), example="pixel")
# Float32 against float32: the engines sum in another order. 1e-3 is far above what that costs (1e-6 to 1e-5 on
# the models tried) and far below what a wrong operator, axis or weight does.
_TOLERANCE = 1e-3

# What a UNet may be told beside latents and timestep, under the names that diffusers gives it.
_HIDDEN_STATES = Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", "context_width"))
_GUIDANCE = Tensor(name="timestep_cond", dtype=FLOAT, axes=("guidance_width",))
_POOLED = Tensor(name="text_embeds", dtype=FLOAT, axes=("pooled_width",))
_SIZES = Tensor(name="size_embeds", dtype=FLOAT, axes=("sizes_width",), example="sinusoids")
_DEEP = Tensor(name="deep_features", dtype=FLOAT, axes=("deep_channels", "latent_height", "latent_width"))


def _input_ids(example: str) -> Tensor:
    return Tensor(name="input_ids", dtype=INT, axes=("tokens",), example=example)


def _states_of(width: str) -> Tensor:
    """One text encoder's share of what the UNet attends to; the shares stand side by side along the last axis."""
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
    """The components with a UNet that tells its deep features, and a shallow one that takes them from an earlier step.

    DeepCache (Ma et al., 2023) at its first branch: all but the last layer of the last block is taken for deep.
    """
    (unet,) = (component for component in components if component.name == "unet")
    telling = replace(unet, wrapper="telling_unet", outputs=(*unet.outputs, _DEEP))
    shallow = replace(unet, name="unet_shallow", inputs=(*unet.inputs, _DEEP))
    return (*(telling if component is unet else component for component in components), shallow)


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
        tolerance=1.0,  # one level of 255, where a value lies on the edge of two
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
# diffusers' pipeline says so too: it decodes in float32 ("make sure the VAE is in float32 mode, as it overflows").
# Of the pipelines, XL's alone heed a mean and a standard deviation per channel.
_VAE_XL = tuple(
    replace(component, wrapper=f"{component.name}_per_channel", overflows_float16=True) for component in _VAE
)

STABLE_DIFFUSION = (_CLIP, _unet(_HIDDEN_STATES), *_VAE)
LATENT_CONSISTENCY = (_CLIP, _unet(_HIDDEN_STATES, _GUIDANCE), *_VAE)
STABLE_DIFFUSION_XL = (*_TEXT_ENCODERS_XL, _unet(_HIDDEN_STATES, _POOLED, _SIZES), *_VAE_XL)
LATENT_CONSISTENCY_XL = (*_TEXT_ENCODERS_XL, _unet(_HIDDEN_STATES, _POOLED, _SIZES, _GUIDANCE), *_VAE_XL)


@dataclass(frozen=True, kw_only=True)
class Amendments:
    """What the constructor of a pipeline changes in the configs that it loads; what is absent there stays absent.

    `scheduler` are entries of its scheduler's, and `inpainting` those that the pipeline for a mask changes beside them.
    `least_old_sample_size`: a UNet's that was saved by diffusers before 0.9, where none was stated rightly.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    inpainting: Mapping[str, Any] = field(default_factory=dict)
    least_old_sample_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints that one set of components serves.

    `pipelines` are diffusers' class names and what each amends; among families that share one, the denoiser's config
    decides. `denoiser` is the component that takes the steps, under the name of the checkpoint's subfolder. `sizes`
    says where the checkpoint states a size: the module and the key of its config.json. `tokenizers` are subfolders,
    one for each text encoder.
    """

    name: str
    pipelines: Mapping[str, Amendments]
    components: tuple[Component, ...]
    denoiser: str
    sizes: Mapping[str, tuple[str, str]]
    tokenizers: tuple[str, ...] = ("tokenizer",)

    @property
    def modules(self) -> dict[str, str]:
        """Subfolder -> the class it must be."""
        return {component.module: component.loader for component in self.components}

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """What reads a prompt, in the order in which their hidden states stand side by side."""
        return tuple(component for component in self.components if component.inputs[0].name == "input_ids")

    @property
    def denoiser_inputs(self) -> tuple[str, ...]:
        """The denoiser's inputs beside latents and timestep."""
        (denoiser,) = (component for component in self.components if component.name == self.denoiser)
        return tuple(tensor.name for tensor in denoiser.inputs if tensor.name not in ("sample", "time"))


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

# StableDiffusionPipeline's and StableDiffusionInpaintPipeline's; those of latent consistency and XL change nothing, but
# for latent consistency under a mask there is only StableDiffusionInpaintPipeline.
_AMENDED = Amendments(
    scheduler={"steps_offset": 1, "clip_sample": False},
    inpainting={"skip_prk_steps": True},
    least_old_sample_size=64,
)
_AMENDED_UNDER_A_MASK = Amendments(inpainting={"steps_offset": 1, "skip_prk_steps": True})
# Saved from an image-to-image pipeline, the parts are the same; only the index names another class.
_PIPELINES = dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"), _AMENDED)
_PIPELINES_LCM = dict.fromkeys(
    ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"), _AMENDED_UNDER_A_MASK
)
_PIPELINES_XL = dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), Amendments())

# 1.x, 2.x, SD-Turbo and what LCM and TCD leave of them without a guidance embedding are one family: their configs,
# weights and schedulers differ, their tensors do not. So with XL, XL-Turbo and XL-Lightning.
FAMILIES = (
    Family(
        name="stable-diffusion",
        pipelines=_PIPELINES,
        components=STABLE_DIFFUSION,
        denoiser="unet",
        sizes=_SIZES_SD,
    ),
    Family(
        name="latent-consistency",
        pipelines=_PIPELINES | _PIPELINES_LCM,
        components=LATENT_CONSISTENCY,
        denoiser="unet",
        sizes={**_SIZES_SD, **_SIZES_LCM},
    ),
    Family(
        name="stable-diffusion-xl",
        pipelines=_PIPELINES_XL,
        components=STABLE_DIFFUSION_XL,
        denoiser="unet",
        sizes=_SIZES_XL,
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
    Family(
        name="latent-consistency-xl",
        pipelines=_PIPELINES_XL,
        components=LATENT_CONSISTENCY_XL,
        denoiser="unet",
        sizes={**_SIZES_XL, **_SIZES_LCM},
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
)
