"""Components, the models of a Triton repository, and their tensors as data. Which a family has is in `families`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hypergen_export.checkpoints.lora import Lora

FLOAT, INT, BYTE = "FP32", "INT32", "UINT8"
# Precisions that quantise: in `int8` and `fp8` a denoiser's weights and activations, in the others weights alone.
INT8, FP8, INT8_WEIGHTS, INT4_WEIGHTS = "int8", "fp8", "int8-weights", "int4-weights"
CALIBRATED = (INT8, FP8)
WEIGHTS_ONLY = (INT8_WEIGHTS, INT4_WEIGHTS)
QUANTIZED = (*CALIBRATED, *WEIGHTS_ONLY)

# Axes that vary between requests. Every other name in `Tensor.axes` is fixed by the checkpoint (`Sizes`).
# `text_tokens` is the prompt's length: in families that mask padding at most the size `tokens`, in those that read it
# in chunks a multiple of it. `templated_tokens` has `template_tokens` more, for which the text encoder returns no
# hidden states. `reference_tokens` are those of all reference images, of which there may be none.
IMAGE_AXES = frozenset({"height", "width", "latent_height", "latent_width"})
FREE_AXES = IMAGE_AXES | {"text_tokens", "templated_tokens", "reference_tokens"}

Sizes = Mapping[str, int]
# What the values of an example follow from, beside the tensor's axes.
_EXAMPLE_SIZES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("vocabulary",),
    "prompt_2": ("vocabulary_2",),
    "prompt_3": ("vocabulary_3",),
    "clip_skip": ("max_clip_skip",),
    "instructed_mask": ("tokens",),
}


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

    def shape(  # noqa: PLR0913 - the free axes
        self,
        sizes: Sizes,
        *,
        batch: int,
        height: int,
        width: int,
        text_tokens: int | None = None,
        reference_tokens: int = 0,
    ) -> tuple[int, ...]:
        """The shape for `batch` samples whose latents are `height` × `width`.

        By default with `tokens` of a prompt and without reference images.
        """
        factor = sizes["vae_scale_factor"]
        tokens = sizes.get("tokens", 0) if text_tokens is None else text_tokens
        free = {
            "latent_height": height,
            "latent_width": width,
            "height": height * factor,
            "width": width * factor,
            "text_tokens": tokens,
            "templated_tokens": tokens + sizes.get("template_tokens", 0),
            "reference_tokens": reference_tokens,
        }
        return (batch, *(self._size(axis, {**sizes, **free}) for axis in self.axes))

    def sizes_of(self, sizes: Sizes) -> Sizes:
        """Those of `sizes` that its shapes and its example's values follow from."""
        named = {"vae_scale_factor", "patch_size", "template_tokens", *self.axes, *_EXAMPLE_SIZES.get(self.example, ())}
        return {name: size for name, size in sizes.items() if name in named}

    def free_axes(self) -> dict[int, str]:
        """Position (counting the batch axis) and name of each axis that may change between calls."""
        named = {i: axis for i, axis in enumerate(self.axes, start=1) if axis in FREE_AXES}
        return {0: "batch", **{i: str(axis) for i, axis in named.items()}}

    @staticmethod
    def _size(axis: str | int, sizes: Sizes) -> int:
        return axis if isinstance(axis, int) else sizes[axis]


_COLUMN_STEP = 8


@dataclass(frozen=True, kw_only=True)
class LoraPool:
    """Low-rank branches beside a module's layers, which many LoRAs share: y = W x + up (scales ⊙ (down x)).

    A LoRA of rank r occupies r of the `rank` columns. `lora_scales` [rank], an input of the component, holds an
    image's scale in the columns of its LoRAs and zeros elsewhere, so images with different LoRAs share a call.
    `kernels`: convolutions that read more than a pixel have a branch, too; the other layers always have one.
    """

    rank: int
    kernels: bool = False

    @classmethod
    def of_columns(cls, columns: int, *, kernels: bool) -> LoraPool:
        """A pool of at least so many columns: a multiple of eight, so that few other LoRAs need another export."""
        return cls(rank=-(-columns // _COLUMN_STEP) * _COLUMN_STEP, kernels=kernels)

    @property
    def scales(self) -> Tensor:
        """The input with an image's scales."""
        return Tensor(name="lora_scales", dtype=FLOAT, axes=(self.rank,))


# Beside the ONNX file of a component with a rank pool: the pool's weights.
POOL_FILE = "lora_pool.safetensors"
# Beside denoisers, the modules whose layers can have a rank pool: the text encoders that trainers change.
_POOLED_TEXT_ENCODERS = ("transformers.CLIPTextModel", "transformers.CLIPTextModelWithProjection")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model of the Triton repository.

    `module` is the checkpoint's subfolder, `loader` its class ("library.Class"). `tolerance` bounds the largest
    difference from torch, relative to the largest magnitude if that exceeds one; for UINT8 it is absolute. `wrapper`
    is a key of `wrappers.WRAPPERS`, empty if it equals the component's name. `overflows_float16`: intermediate values
    exceed float16's range, so this component is computed in float32 when the others are computed in float16.
    `is_typed`: in bfloat16 its file is computed as it is typed, also by OpenVINO, instead of in float32 with a hint.
    `kept_layers` are the layers of a large module that are compared with torch: the end of a list's path -> indices.
    `computed_with`: endings of the names of large tensors whose values the wrapper needs, so that they are loaded.
    `unused` are beginnings of the names of the module's tensors that the component does not compute with, where these
    count. `lora` is merged into the module's weights; LoRAs in the
    `pool` are weights beside the module's.
    `quantized` are the precisions of an export in which this component is quantised; in the other ones of `QUANTIZED`
    it is computed in bfloat16. `unquantized` are regular expressions for the beginnings of names of weights that stay
    as they are then, and `modulation` for those of layers that read a vector per image instead of tokens: they stay as
    they are where activations are quantised, too.
    """

    name: str
    module: str
    loader: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float
    wrapper: str = ""
    overflows_float16: bool = False
    is_typed: bool = False
    kept_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    computed_with: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    lora: Lora | None = None
    pool: LoraPool | None = None
    quantized: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    modulation: tuple[str, ...] = ()

    def sizes_of(self, sizes: Sizes) -> Sizes:
        """Those of `sizes` that the component's graph and its examples follow from."""
        tensors = (*self.inputs, *self.outputs)
        return {name: size for tensor in tensors for name, size in tensor.sizes_of(sizes).items()}

    @property
    def is_denoiser(self) -> bool:
        """Whether this component takes the denoising steps."""
        return self.inputs[0].name == "sample"

    def with_lora(self, lora: Lora) -> Component:
        """This component with the LoRA merged, as a further model of the repository."""
        return replace(self, name=f"{self.name}.{lora.label}", wrapper=self.wrapper or self.name, lora=lora)

    @property
    def can_have_pool(self) -> bool:
        """Whether its module's layers can have a rank pool."""
        return self.is_denoiser or self.loader in _POOLED_TEXT_ENCODERS

    def with_pool(self, pool: LoraPool) -> Component:
        """This component with a rank pool, if its module can have one."""
        return replace(self, inputs=(*self.inputs, pool.scales), pool=pool) if self.can_have_pool else self

    def is_quantized(self, dtype: str) -> bool:
        """Whether this component is quantised in an export in `dtype`."""
        return dtype in self.quantized

    def keeps(self, weights: str, dtype: str) -> bool:
        """Whether the weights of this name stay as they are in an export in `dtype`, which quantises others."""
        listed = self.unquantized + (self.modulation if dtype in CALIBRATED else ())
        return any(re.match(each, weights) for each in listed)

    def weights_dtype(self, dtype: str) -> str:
        """The precision in an export in `dtype` of what is not quantised."""
        if self.overflows_float16 and dtype == "float16":
            return "float32"
        return "bfloat16" if dtype in QUANTIZED else dtype
