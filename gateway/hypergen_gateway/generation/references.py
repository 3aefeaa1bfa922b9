"""Reference images in a size that the model takes, scaled and cropped as by diffusers' pipelines of the model.

Follows Flux2KleinPipeline, and FluxKontextPipeline where the model names sizes. Blocks, so it is called in a thread.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription, Pixels
from hypergen_gateway.generation.sizes import Size

# Of diffusers' Flux2ImageProcessor.
_SHORTEST_SIDE = 64
_LARGEST_RATIO = 8


def to_reference(image: Image.Image, param: str, model: ModelDescription) -> Pixels:
    """An image as a reference, RGB [height, width, 3].

    Raises:
        InvalidRequestError: it is too small or too long; `param` is the field of the images.
    """
    width, height = image.size
    if min(image.size) < _SHORTEST_SIDE or max(image.size) > _LARGEST_RATIO * min(image.size):
        raise InvalidRequestError(
            f"An image in '{param}' is {width}x{height}. Each side must be at least {_SHORTEST_SIDE} pixels, and none "
            f"more than {_LARGEST_RATIO} times as long as the other.",
            param,
        )
    size = reference_size(image.size, model)
    if model.preferred_reference_sizes:
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    scaled = _within_limits(image.size, model)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def reference_size(size: Size, model: ModelDescription) -> Size:
    """The size of the reference that an image of `size` becomes."""
    if model.preferred_reference_sizes:
        return _closest_shape(size, model)
    width, height = (_floor(side, model) for side in _within_limits(size, model))
    return width, height


def _within_limits(size: Size, model: ModelDescription) -> Size:
    width, height = size
    scale = min(
        math.sqrt(model.max_reference_pixels / (width * height)), model.max_reference_side / max(width, height), 1.0
    )
    return int(width * scale), int(height * scale)


def _closest_shape(size: Size, model: ModelDescription) -> Size:
    width, height = (_floor(side, model) for side in size)
    sizes = [(int(wide), int(high)) for wide, high in (text.split("x") for text in model.preferred_reference_sizes)]
    return min(sizes, key=lambda each: (abs(width / height - each[0] / each[1]), each))


def _floor(side: int, model: ModelDescription) -> int:
    return max(side // model.size_factor, 1) * model.size_factor
