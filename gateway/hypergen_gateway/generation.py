"""The seam between the HTTP side and whatever makes the pictures.

Knows what a request for pictures is, what a picture is, what a model tells about itself, and the one interface
through which they are exchanged. Knows neither HTTP nor Triton, so a test can stand in on either side.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**63 - 1
Lines = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A request for pictures, complete and legal for the model. Picture i is drawn from `seed + i`."""

    prompt: str
    negative_prompt: str | None = None
    num_images: int = 1
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None = None  # None: the checkpoint's own
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished picture: RGB pixels [height, width, 3], its place in the request and the seed it came from."""

    pixels: NDArray[np.uint8]
    index: int
    seed: int


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
    default_num_inference_steps: int
    default_guidance_scale: float
    max_num_images: int
    max_num_inference_steps: int
    max_guidance_scale: float
    max_active_images: int
    suggestions: Lines  # prompts that the model draws well; none for most


class Backend(Protocol):
    """Makes pictures. Every method raises a `HyperGenError` and nothing else, and none waits for ever."""

    async def describe(self) -> ModelDescription:
        """The model's description: the last one read when it cannot be read now, `UnavailableError` without one."""
        ...

    async def ready(self) -> bool:
        """Whether a picture could be made now. Never raises."""
        ...

    def generate(self, generation: Generation) -> AsyncGenerator[Picture, None]:
        """The pictures, each as soon as it is finished, in any order. Closing the generator stops the work."""
        ...

    async def close(self) -> None:
        """Gives back connections. The backend cannot be used afterwards."""
        ...
