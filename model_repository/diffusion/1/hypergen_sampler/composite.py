"""A repainted picture over its original. Knows pixels alone."""

from __future__ import annotations

import numpy as np

from hypergen_sampler.request import Pixels


def composite(drawn: Pixels, original: Pixels, mask: Pixels) -> Pixels:
    """[H, W, 3]: `drawn` where `mask` [H, W] is 255, `original` to the bit where it is 0, their mixture in between."""
    weight = mask.astype(np.uint16)[..., None]
    # The weights of a pixel add up to 255, so the sum of products, with half a step to round by, fits 16 bits.
    blended: Pixels = ((drawn * weight + original * (255 - weight) + 127) // 255).astype(np.uint8)
    return blended
