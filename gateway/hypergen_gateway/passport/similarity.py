"""Distances between images, and between latents, by scikit-image.

LPIPS is left out, as its weights come from a hub; a CLIP score, as checkpoints have no CLIP image encoder.
"""

from __future__ import annotations

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hypergen_gateway.generation.backend import Latents, Pixels

# That of equal images would be infinite, which no mean survives.
MAX_PSNR = 100.0


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of 8-bit images in dB, at most `MAX_PSNR`."""
    if np.array_equal(image, reference):
        return MAX_PSNR
    return min(MAX_PSNR, float(peak_signal_noise_ratio(reference, image, data_range=255)))


def ssim(image: Pixels, reference: Pixels) -> float:
    """Structural similarity, the mean over colours, with the window of Wang et al. (2004)."""
    return float(
        structural_similarity(
            reference,
            image,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def relative_error(latents: Latents, reference: Latents) -> float:
    """Norm of the difference, divided by that of the reference."""
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))
