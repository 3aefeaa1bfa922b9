"""Inpainting in pixels: the generated image where the mask is, the input image elsewhere."""

from __future__ import annotations

import numpy as np

from hypergen_sampler.request import Pixels


def composite(generated: Pixels, original: Pixels, mask: Pixels) -> Pixels:
    """[H, W, 3]: `generated` where `mask` [H, W] is 255, exactly `original` where it is 0, a mixture between."""
    weight = mask.astype(np.uint16)[..., None]
    # The weights of a pixel add up to 255, so the sum of products, with half a step to round by, fits 16 bits.
    blended: Pixels = ((generated * weight + original * (255 - weight) + 127) // 255).astype(np.uint8)
    return blended
