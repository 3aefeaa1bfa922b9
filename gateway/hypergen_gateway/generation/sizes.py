"""Image sizes: which ones a request may have, which ones the model generates for them, and how those are cropped.

Depends only on the model's description, not on requests or pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom

PolicyName = Literal["fit", "strict"]
# The longest side that a WebP file can have; PNG and JPEG allow more.
LONGEST_SIDE = 16_383


@dataclass(frozen=True, kw_only=True)
class SizePolicy:
    """Which sizes a request may have.

    `fit` accepts any size with sides up to `max_side`, or up to the model's own limit if that is larger: the nearest
    size that the model generates is scaled to the requested one.
    `strict` accepts only the sizes that the model generates.
    """

    name: PolicyName = "fit"
    max_side: int = 4096

    def check(self, requested: Size, model: ModelDescription) -> None:
        """Raises `InvalidRequestError` for a size that is not allowed."""
        is_legal = is_native(requested, model)
        if self.name == "fit":
            is_legal = min(requested) >= 1 and max(requested) <= self.limit(model)
        if is_legal:
            return
        width, height = requested
        raise InvalidRequestError(
            f"Invalid value for 'size': \"{width}x{height}\". It must be 'auto' or {self.legal(model)}.", "size"
        )

    def limit(self, model: ModelDescription) -> int:
        """The longest side that is allowed; never less than the model's own limit."""
        return max(self.max_side, model.max_size) if self.name == "fit" else model.max_size

    def legal(self, model: ModelDescription) -> str:
        """The sizes that are allowed, to complete "It must be …"."""
        example = f"WIDTHxHEIGHT in pixels, such as '{model.default_width}x{model.default_height}'"
        if self.name == "fit":
            return f"{example}, each side from 1 to {self.limit(model)}"
        if model.sizes:
            return f"one of {', '.join(model.sizes)}"
        return f"{example}, both multiples of {model.size_factor} from {model.min_size} to {model.max_size}"


def is_native(size: Size, model: ModelDescription) -> bool:
    """Whether the model generates exactly this size."""
    if model.sizes:
        return f"{size[0]}x{size[1]}" in model.sizes
    return all(model.min_size <= side <= model.max_size and side % model.size_factor == 0 for side in size)


def nearest_size(requested: Size, model: ModelDescription) -> Size:
    """The nearest size that the model generates: in aspect ratio, then in area. One that it generates is unchanged."""
    if model.sizes:
        built = [(int(width), int(height)) for width, height in (size.split("x") for size in model.sizes)]
        return min(built, key=lambda size: (_distortion(size, requested), _growth(size, requested)))
    smallest, largest = sorted(requested)
    scale = min(max(1.0, model.min_size / smallest), model.max_size / largest)
    width, height = (_nearest_side(side * scale, model) for side in requested)
    return width, height


def crop_box(generated: Size, requested: Size) -> Box:
    """The part of a generated image to scale to `requested` without distortion.

    All of the image, but for what is cut off evenly from two sides if the aspect ratios differ.
    """
    scale = max(requested[0] / generated[0], requested[1] / generated[1])
    width, height = (min(max(round(side / scale), 1), most) for side, most in zip(requested, generated, strict=True))
    left, top = (generated[0] - width) // 2, (generated[1] - height) // 2
    return left, top, left + width, top + height


def _nearest_side(side: float, model: ModelDescription) -> int:
    multiple = math.floor(side / model.size_factor + 0.5) * model.size_factor
    return min(max(multiple, model.min_size), model.max_size)


def _distortion(size: Size, requested: Size) -> float:
    """How far apart two aspect ratios are, rounded so that the area decides between similar ones."""
    return round(abs(math.log(size[0] * requested[1] / (size[1] * requested[0]))), 1)


def _growth(size: Size, requested: Size) -> float:
    return abs(math.log(size[0] * size[1] / (requested[0] * requested[1])))
