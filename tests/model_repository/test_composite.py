"""What a mask keeps of an image, in pixels."""

from __future__ import annotations

import numpy as np

from hypergen_sampler.composite import composite

RANDOM = np.random.default_rng(1)
GENERATED, ORIGINAL = RANDOM.integers(0, 256, size=(2, 16, 256, 3), dtype=np.uint8)
# Every value from 0 to 255 along each row.
MASK = np.tile(np.arange(256, dtype=np.uint8), (16, 1))


def test_0_keeps_the_original_and_255_takes_what_was_generated_to_the_bit() -> None:
    blended = composite(GENERATED, ORIGINAL, MASK)
    assert np.array_equal(blended[:, 0], ORIGINAL[:, 0])
    assert np.array_equal(blended[:, 255], GENERATED[:, 255])


def test_in_between_it_is_the_nearest_level_to_their_mixture() -> None:
    weight = MASK[..., None] / 255
    exact = GENERATED * weight + ORIGINAL * (1 - weight)
    assert np.abs(composite(GENERATED, ORIGINAL, MASK) - exact).max() <= 0.5 + 1e-9


def test_nothing_generated_over_itself_changes() -> None:
    assert np.array_equal(composite(ORIGINAL, ORIGINAL, MASK), ORIGINAL)
