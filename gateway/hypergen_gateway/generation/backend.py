"""The interface between the API and the backend that generates images, and the types that cross it.

Does not depend on HTTP or Triton, so tests can replace either side.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**63 - 1
Lines = tuple[str, ...]
Names = tuple[str, ...]
Scales = tuple[float, ...]
Int64 = int  # other integers of a request are 32 bits wide
Pixels = NDArray[np.uint8]
Sides = NDArray[np.int32]
Latents = NDArray[np.float32]


# The shares of the steps between which the sampler skips layers by default.
SKIP_LAYER_GUIDANCE_START, SKIP_LAYER_GUIDANCE_STOP = 0.01, 0.2


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A complete request for images, validated against the model. Image i has the seed `seed + i`."""

    prompt: str
    negative_prompt: str | None = None
    num_images: int = 1
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    image_guidance_scale: float | None = None  # of an edit by instruction; None: the model's default
    guidance_start: float | None = None  # from 0 to 1: the share of the steps after which guidance begins; None: 0
    guidance_end: float | None = None  # and after which it ends; None: 1
    cache_interval: int | None = None  # run the full UNet every so many steps (DeepCache); None: 1
    scheduler: str | None = None  # None: the checkpoint's own
    seed: Int64
    partial_images: int = 0  # previews of each image, at evenly spaced steps
    image: Pixels | None = None  # the init image, RGB [height, width, 3]
    mask: Pixels | None = None  # [height, width]; 255 is repainted, 0 stays as in `image`
    references: Pixels | None = None  # the bytes of all reference images, one after another, each RGB
    reference_sizes: Sides | None = None  # [images, 2]: height and width of each
    strength: float | None = None  # from 0 to 1, how much of `image` is replaced by noise; None: the model's default
    timestep_spacing: str | None = None  # None: as the scheduler is configured
    sigmas: str | None = None  # likewise
    eta: float | None = None  # DDIM's; None: 0
    guidance_rescale: float | None = None  # None: 0
    skip_layer_guidance_scale: float | None = None  # None: the model's default
    skip_layer_guidance_start: float | None = None  # from 0 to 1: between these shares of the steps
    skip_layer_guidance_stop: float | None = None  # None: as above
    prompt_weighting: str | None = None  # the syntax of weights in both prompts; None: none
    clip_skip: int | None = None  # so many of CLIP's last layers are left out; None: the model's default
    lora: Names = ()  # of LoRAs that the model is served with
    lora_scale: Scales = ()  # of each of them
    return_latents: bool | None = None  # whether the final latents come with each image

    @property
    def reference_pixels(self) -> list[int]:
        """Height times width of each reference image."""
        return [] if self.reference_sizes is None else self.reference_sizes.prod(axis=1).tolist()


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The time that an image spent in each phase of the sampler, in milliseconds."""

    queue: float
    encode_text: float
    denoise: float
    decode: float


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImage:
    """An image or a preview of one: RGB pixels [height, width, 3], the index in the request and the seed.

    A preview, for which `is_final` is false, is what the model expects the image to become, judging after `step` steps.
    After 0 steps, it is the init image.
    """

    pixels: Pixels
    index: int
    seed: int
    step: int
    is_final: bool
    prompt_tokens: int  # of the prompt and the negative prompt, as read by the text encoder
    truncated_tokens: int = 0  # of both, cut off by the text encoder
    timings: Timings
    latents: Latents | None = None  # [channels, height, width], as the scheduler left them, if requested


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA that requests may name."""

    name: str
    scale: float  # the default, or that at which it is merged
    is_merged: bool = False  # only this scale is served, and no two merged ones together
    columns: int = 0  # of the rank pool that it takes
    in_pool: bool = True  # otherwise the next request that names it waits until it is
    changes: tuple[str, ...] = ()  # the checkpoint's modules
    is_of_folder: bool = False  # a file there can be replaced and removed; others are served until the server stops


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How far a model's images are from those in float32 at equal seeds: means over `prompts`, and the worst of each.

    PSNR in dB, 100 for equal images; SSIM up to 1; the error of the final latents relative to their norm, None if it is
    unknown. `time` is that of an image divided by the time in float32.
    """

    fields: Mapping[str, int | float | str]  # of the request, beside the model's defaults
    prompts: int
    psnr: float
    lowest_psnr: float
    ssim: float
    lowest_ssim: float
    latents_error: float | None
    highest_latents_error: float | None
    time: float


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A served model's description of itself. Fields are named like the parameters in its `config.pbtxt`."""

    model_id: str
    export_key: str  # differs between any two exports that could generate different images
    engine: str
    dtype: str
    device: str
    components: tuple[str, ...]  # the models that the sampler calls
    schedulers: tuple[str, ...]
    default_width: int
    default_height: int
    size_factor: int
    min_size: int
    max_size: int
    sizes: tuple[str, ...]  # WIDTHxHEIGHT that the engines were built for; empty if they accept any
    loras: tuple[Lora, ...]  # of a merged LoRA one entry for each scale, its default first
    default_num_inference_steps: int
    default_guidance_scale: float
    max_prompt_tokens: int  # that the text encoders read, without start and end tokens
    max_num_images: int
    max_num_inference_steps: int
    min_guidance_scale: float  # at which guidance is the identity, if there is such a scale
    max_guidance_scale: float
    guidance: str  # the kind; see `has_negative_prompt`
    default_image_guidance_scale: float
    max_image_guidance_scale: float  # 0: see `edits_by_instruction`
    max_cache_interval: int  # 1: the model has no shallow UNet
    prompt_weightings: tuple[str, ...]  # the syntaxes of weights in prompts that a request may select
    default_prompt_weighting: str
    embeddings: tuple[str, ...]  # words of textual inversions that prompts may contain
    max_clip_skip: int  # 0: the text encoders have no such input
    default_clip_skip: int
    max_skip_layer_guidance_scale: float  # 0: the model has no skip-layer guidance
    default_skip_layer_guidance_scale: float
    max_active_images: int
    max_references: int  # reference images of a request; 0: the model takes none
    masked_image_yields: int  # whether a masked image is a reference itself only where no other is given
    max_reference_pixels: int  # height times width of one
    max_reference_side: int
    preferred_reference_sizes: tuple[str, ...]  # WIDTHxHEIGHT that they are scaled to; empty if they may have any
    base_model: str  # of a single file, for people; empty for others
    suggestions: Lines  # prompts that suit the model; empty for most
    passport: tuple[Quality, ...]  # as it was measured, for some settings; empty if it was not

    @property
    def has_negative_prompt(self) -> bool:
        """Whether guidance is away from a negative prompt, which takes a second row of the denoiser.

        Otherwise the denoiser is given the guidance scale (`embedded`), or there is no guidance (`none`).
        """
        return self.guidance not in ("embedded", "none")

    @property
    def edits_by_instruction(self) -> bool:
        """Whether the model only edits images, as the prompt says, from noise alone."""
        return self.max_image_guidance_scale > 0


class Backend(Protocol):
    """Generates images. Methods raise only `HyperGenError` and never wait forever."""

    @property
    def rejected_loras(self) -> Mapping[str, str]:
        """Name -> reason, of LoRA files that are there but cannot be served."""
        ...

    async def describe(self) -> ModelDescription:
        """The model's description, or the last one read if it cannot be read now.

        Raises:
            UnavailableError: no description has been read yet.
        """
        ...

    async def ready(self) -> bool:
        """Whether an image could be generated now. Never raises."""
        ...

    def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        """The images, each as soon as it is finished, in any order. Closing the generator stops the work."""
        ...

    async def close(self) -> None:
        """Closes all connections. The backend cannot be used afterwards."""
        ...
