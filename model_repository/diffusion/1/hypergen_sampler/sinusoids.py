"""Sinusoidal embeddings of numbers, such as the timestep input of a denoiser.

Computed here instead of in the denoiser's graph, since an engine in bfloat16 rounds the angle before taking its sine:
near 999, bfloat16 has a resolution of 4, more than half a turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_LONGEST_PERIOD = 10_000


@dataclass(frozen=True, kw_only=True)
class Sinusoid:
    """diffusers' `get_timestep_embedding` with these settings, in its own float32 arithmetic."""

    width: int
    flip_sin_to_cos: bool
    """Whether the cosines come first."""
    freq_shift: float

    def __call__(self, values: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Embed [N] numbers as [N, width] sines and cosines."""
        half = self.width // 2
        exponents = -math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32) / (half - self.freq_shift)
        angles = torch.as_tensor(values, dtype=torch.float32)[:, None] * torch.exp(exponents)[None]
        waves = [torch.sin(angles), torch.cos(angles)]
        embedding = torch.cat(waves[::-1] if self.flip_sin_to_cos else waves, dim=-1)
        return np.pad(embedding.numpy(), ((0, 0), (0, self.width % 2)))
