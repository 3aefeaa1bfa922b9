"""What a family of checkpoints consists of: one row per component of the Triton repository.

It knows names, tensors, free axes, example values and tolerances, all as data and without torch, and nothing
of how a component is loaded or converted. A new family is a new tuple of rows; a new input is a new `Tensor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT, INT, BYTE = "FP32", "INT32", "UINT8"

# Axes that a request chooses. Every other name in `Tensor.axes` is fixed by the checkpoint (`Sizes`).
FREE_AXES = frozenset({"height", "width", "latent_height", "latent_width"})

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output without its leading batch axis.

    `axes` holds names of sizes or plain numbers; none at all means one number per sample. `example` says what
    values mean something to the component: a key of `examples.VALUES`.
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
    `overflows_float16`: values inside leave float16's range, so an engine must compute this one in float32, whatever
    it computes the others in.
    """

    name: str
    module: str
    loader: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float
    overflows_float16: bool = False

    def weights_dtype(self, dtype: str) -> str:
        """What this component is computed in where `dtype` is asked for."""
        return "float32" if self.overflows_float16 and dtype == "float16" else dtype


_LATENTS = ("latent_channels", "latent_height", "latent_width")
_HIDDEN_STATES = Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", "text_width"))
_IMAGE = Tensor(name="image", dtype=BYTE, axes=("height", "width", 3), example="pixel")

# Float32 against float32: the engines sum in another order. 1e-3 is far above what that costs (1e-6 to 1e-5 on
# the models tried) and far below what a wrong operator, axis or weight does.
STABLE_DIFFUSION = (
    Component(
        name="text_encoder",
        module="text_encoder",
        loader="transformers.CLIPTextModel",
        inputs=(Tensor(name="input_ids", dtype=INT, axes=("tokens",), example="token"),),
        outputs=(_HIDDEN_STATES,),
        tolerance=1e-3,
    ),
    Component(
        name="unet",
        module="unet",
        loader="diffusers.UNet2DConditionModel",
        inputs=(
            Tensor(name="sample", dtype=FLOAT, axes=_LATENTS),
            Tensor(name="timestep", dtype=FLOAT, axes=(), example="timestep"),
            _HIDDEN_STATES,
        ),
        outputs=(Tensor(name="model_output", dtype=FLOAT, axes=_LATENTS),),
        tolerance=1e-3,
    ),
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
        tolerance=1e-3,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints that one set of components serves; `pipelines` are diffusers' class names."""

    name: str
    pipelines: frozenset[str]
    components: tuple[Component, ...]

    @property
    def modules(self) -> dict[str, str]:
        """Subfolder -> the class it must be."""
        return {component.module: component.loader for component in self.components}


FAMILIES = (
    Family(
        name="stable-diffusion",
        # Saved from an image-to-image pipeline, the parts are the same; only the index names another class.
        pipelines=frozenset({"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"}),
        components=STABLE_DIFFUSION,
    ),
)
