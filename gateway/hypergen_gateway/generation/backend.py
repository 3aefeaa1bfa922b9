"""The interface between the API and the backend that generates images, and the types that cross it.

Does not depend on HTTP or Triton, so tests can replace either side.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**63 - 1
Lines = tuple[str, ...]
Int64 = int  # other integers of a request are 32 bits wide
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Images to generate, complete and legal for the model. Image i has the seed `seed + i`."""

    prompt: str
    negative_prompt: str | None = None
    num_images: int = 1
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    guidance_start: float | None = None  # from 0 to 1: the share of the steps where guidance begins; None: 0
    guidance_end: float | None = None  # and where it ends; None: 1
    cache_interval: int | None = None  # of so many steps the first one's deep features serve all; None: 1
    scheduler: str | None = None  # None: the checkpoint's own
    seed: Int64
    partial_images: int = 0  # previews of each picture on its way, at evenly spaced steps
    image: Pixels | None = None  # RGB [height, width, 3] to start from
    mask: Pixels | None = None  # [height, width]; 255 is repainted, 0 stays as in `image`
    strength: float | None = None  # from 0 to 1, how much of `image` is noised away; None: the model's default
    lora: str | None = None  # the name of one that the model was exported with
    lora_scale: float | None = None  # one of its scales; None: the usual one


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the sampler spent a picture's time, in milliseconds."""

    queue: float
    encode_text: float
    denoise: float
    decode: float


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImage:
    """A picture: RGB pixels [height, width, 3], its place in the request and the seed it came from.

    A preview is what the model expects the picture to become after `step` steps; `is_final` tells the two apart. After
    no step it is the image that it started from.
    """

    pixels: Pixels
    index: int
    seed: int
    step: int
    is_final: bool
    prompt_tokens: int  # of the prompt and the negative prompt, as the text encoder read them
    truncated_tokens: int = 0  # of both, what it did not read
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA that is merged into a model at this scale."""

    name: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a served model says about itself. The fields are named as the parameters in its `config.pbtxt`."""

    model_id: str
    device: str
    components: tuple[str, ...]  # the models that the sampler calls
    schedulers: tuple[str, ...]
    default_width: int
    default_height: int
    size_factor: int
    min_size: int
    max_size: int
    sizes: tuple[str, ...]  # WIDTHxHEIGHT of those built in; none where the engines take any
    loras: tuple[Lora, ...]  # each at each of its scales, the usual one first
    default_num_inference_steps: int
    default_guidance_scale: float
    max_prompt_tokens: int  # that the text encoders read, without start and end
    max_num_images: int
    max_num_inference_steps: int
    max_guidance_scale: float
    guidance_width: int  # 0: guidance takes a second row of the UNet, in the steps that are guided; else it is inside
    max_cache_interval: int  # 1: the model has no shallow UNet
    max_active_images: int
    suggestions: Lines  # prompts that the model draws well; none for most


class Backend(Protocol):
    """Generates images. Methods raise only `HyperGenError`, and none waits forever."""

    async def describe(self) -> ModelDescription:
        """The model's description: the last one read when it cannot be read now, `UnavailableError` without one."""
        ...

    async def ready(self) -> bool:
        """Whether a picture could be made now. Never raises."""
        ...

    def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        """The pictures, each as soon as it is finished, in any order. Closing the generator stops the work."""
        ...

    async def close(self) -> None:
        """Gives back connections. The backend cannot be used afterwards."""
        ...
