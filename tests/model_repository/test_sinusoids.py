"""Embeddings of timesteps and sizes against diffusers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from hypergen_sampler.sinusoids import Sinusoid


@pytest.mark.parametrize("width", [2, 32, 320, 321])
@pytest.mark.parametrize("flip_sin_to_cos", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 0.5])
def test_numbers_are_embedded_as_in_diffusers_to_the_bit(width: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
    numbers = [0.0, 0.3, 1.0, 501.5, 961.0, 999.0, 4096.0]
    ours = Sinusoid(width=width, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)(numbers)
    theirs = Timesteps(width, flip_sin_to_cos, freq_shift)(torch.tensor(numbers)).numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == np.float32
