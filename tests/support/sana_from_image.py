"""Image-to-image and inpainting by diffusers' SanaPipeline, which it has no pipelines of.

It starts where SanaSprintImg2ImgPipeline does, and keeps what a mask does not cover as StableDiffusion3InpaintPipeline.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import SanaPipeline
from diffusers.pipelines.sana import pipeline_sana
from PIL import Image as PILImage


class SanaFromImagePipeline(SanaPipeline):  # type: ignore[misc, unused-ignore]  # untyped
    """SanaPipeline that starts from an image with noise."""

    def __call__(self, **given: Any) -> Any:
        """Generate an image; takes `image`, `strength` and perhaps `mask_image` beside SanaPipeline's arguments."""
        original = self._encoded(given.pop("image"))
        strength, mask, told = given.pop("strength"), given.pop("mask_image", None), given.pop("callback_on_step_end")
        noise = torch.randn(original.shape, generator=given["generator"])
        covered = torch.ones_like(original[:, :1]) if mask is None else _covered(mask, original)

        steps = given["num_inference_steps"]
        first = int(max(steps - min(steps * strength, steps), 0))

        def last_timesteps(scheduler: Any, *_: Any) -> tuple[torch.Tensor, int]:
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(first)
            return scheduler.timesteps[first:], steps - first

        def blend(_: Any, step: int, __: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            following = self.scheduler.timesteps[first + step + 1 :]
            kept = self._noisy(original, noise, following[:1]) if len(following) else original
            latents = (1 - covered) * kept + covered * tensors["latents"]
            told(self, step, None, {"latents": latents})
            return {"latents": latents}

        timesteps, _ = last_timesteps(self.scheduler)
        is_noise = mask is not None and strength == 1.0
        latents = noise if is_noise else self._noisy(original, noise, timesteps[:1])
        with patch.object(pipeline_sana, "retrieve_timesteps", last_timesteps):
            return super().__call__(**given, latents=latents, callback_on_step_end=blend)

    def _encoded(self, image: PILImage.Image) -> torch.Tensor:
        pixels = self.image_processor.preprocess(image)
        with torch.no_grad():
            latents: torch.Tensor = self.vae.encode(pixels).latent * self.vae.config.scaling_factor
        return latents

    def _noisy(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if hasattr(self.scheduler, "add_noise"):
            noisy: torch.Tensor = self.scheduler.add_noise(original, noise, timesteps)
        else:
            noisy = self.scheduler.scale_noise(original, timesteps, noise)
        return noisy


def _covered(mask: PILImage.Image, latents: torch.Tensor) -> torch.Tensor:
    """Which latent pixels are repainted [1, 1, h, w]."""
    pixels = torch.from_numpy((np.asarray(mask.convert("L")) >= 128).astype(np.float32))
    return torch.nn.functional.interpolate(pixels[None, None], size=latents.shape[2:])
