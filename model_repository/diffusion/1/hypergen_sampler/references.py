"""Reference images as tokens, which the denoiser attends to beside those of the image that it generates.

Follows `prepare_image_latents` of diffusers' Flux2KleinPipeline and FluxKontextPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypergen_sampler.request import Architecture

REFERENCES = "references"
REFERENCE_POSITIONS = "reference_positions"


def reference_tokens(
    latents: Sequence[npt.NDArray[np.float32]], architecture: Architecture
) -> Mapping[str, npt.NDArray[Any]]:
    """The tokens [N, D] of encoded images [C, h, w], and the position [N, 3] of each: image, row and column."""
    tokens = [_tokens(each, architecture.patch_size) for each in latents]
    step = architecture.reference_position_step
    positions = [_positions(step * number, grid) for number, grid in enumerate(tokens, start=1)]
    width = architecture.token_width
    return {
        REFERENCES: np.concatenate([np.empty((0, width), np.float32), *(grid.reshape(-1, width) for grid in tokens)]),
        REFERENCE_POSITIONS: np.concatenate([np.empty((0, 3), np.int32), *positions]),
    }


def _tokens(latents: npt.NDArray[np.float32], patch_size: int) -> npt.NDArray[np.float32]:
    """[C, h, w] -> [rows, columns, D]: each channel's pixels of a patch are neighbouring features."""
    packed: npt.NDArray[np.float32] = torch.nn.functional.pixel_unshuffle(torch.from_numpy(latents), patch_size).numpy()
    return packed.transpose(1, 2, 0)


def _positions(image: int, tokens: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    rows, columns = np.indices(tokens.shape[:2], dtype=np.int32)
    positions: npt.NDArray[np.int32] = np.stack([np.full_like(rows, image), rows, columns], axis=-1)
    return positions.reshape(-1, 3)
