"""Compositing of an inpainted image with the input image, in pixels."""

from __future__ import annotations

import numpy as np

from hypergen_sampler.request import Pixels


def composite(generated: Pixels, original: Pixels, mask: Pixels) -> Pixels:
    """[H, W, 3]: `generated` where `mask` [H, W] is 255, exactly `original` where it is 0, a blend in between."""
    weight = mask.astype(np.uint16)[..., None]
    # The weights of a pixel add up to 255, so the sum of products plus half a step for rounding fits in 16 bits.
    blended: Pixels = ((generated * weight + original * (255 - weight) + 127) // 255).astype(np.uint8)
    return blended
