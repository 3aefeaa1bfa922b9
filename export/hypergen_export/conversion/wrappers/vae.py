"""Wrappers of VAEs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VaeDecoder(nn.Module):
    """latents [B, C, h, w] in the scheduler's scale -> image [B, H, W, 3] uint8 and its `pixel_mean` [B, 1].

    `per_channel`: use the mean and standard deviation per latent channel if the config states them. `shifted`: use the
    config's `shift_factor`.
    """

    def __init__(self, vae: Any, *, per_channel: bool = False, shifted: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.scale, self.shift = _scale_and_shift(vae.config, per_channel, shifted)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        unscaled = (latents / self.scale + self.shift).to(self.vae.dtype)
        return to_image(self.vae.decode(unscaled, return_dict=False)[0])


class VaeEncoder(nn.Module):
    """image [B, H, W, 3] uint8 -> mean and std [B, C, h, w] of the posterior, in the scheduler's scale.

    For inpainting models also `kept` [B, H, W, 1]: where it is 0, the image is blank, which no uint8 is. Not `scaled`:
    in the VAE's own scale, as models that edit by instruction are given an image.
    """

    def __init__(self, vae: Any, *, per_channel: bool = False, shifted: bool = False, scaled: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.scale, self.shift = _scale_and_shift(vae.config, per_channel, shifted) if scaled else (1.0, 0.0)

    def forward(self, image: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pixels = _blank(to_pixels(image), kept)
        posterior = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        mean, std = posterior.mean.to(torch.float32), posterior.std.to(torch.float32)
        return (mean - self.shift) * self.scale, std * self.scale


class TinyVaeDecoder(nn.Module):
    """As `VaeDecoder`, by an AutoencoderTiny."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return to_image(self.vae.decode((latents / self.scale).to(self.vae.dtype), return_dict=False)[0])


class TinyVaeEncoder(nn.Module):
    """image [B, H, W, 3] uint8 -> its latents [B, C, h, w] in the scheduler's scale, and zeros: they are exact."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)

    def forward(self, image: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pixels = _blank(to_pixels(image), kept)
        latents = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0].to(torch.float32) * self.scale
        return latents, latents * 0


def to_image(decoded: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's output [B, 3, H, W] in -1 … 1 as an image [B, H, W, 3] uint8, and the mean [B, 1] of its values.

    Bytes do not tell a black image from one of infinities or NaN. Their mean does: it is not finite either.
    """
    decoded = decoded.to(torch.float32)
    unit = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (unit * 255).round().to(torch.uint8), decoded.mean(dim=(1, 2, 3))[:, None]


def to_pixels(image: Tensor) -> Tensor:
    """An image [B, H, W, 3] uint8 as the VAE's input [B, 3, H, W] in -1 … 1."""
    # Cast first: the only operator that TensorRT has for uint8 is the cast.
    return image.to(torch.float32).permute(0, 3, 1, 2) / 255 * 2 - 1


def _blank(pixels: Tensor, kept: Tensor | None) -> Tensor:
    return pixels if kept is None else pixels * kept.to(torch.float32).clamp(max=1).permute(0, 3, 1, 2)


def _scale_and_shift(config: Any, per_channel: bool, shifted: bool) -> tuple[float | Tensor, float | Tensor]:
    """The scheduler's latents are (the VAE's - shift) * scale. No pipeline with a UNet uses `shift_factor`."""
    scale = float(config.scaling_factor)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if shifted:
        return scale, float(config.shift_factor or 0.0)
    if not per_channel or mean is None or std is None:
        return scale, 0.0
    return scale / torch.tensor(std).view(1, -1, 1, 1), torch.tensor(mean).view(1, -1, 1, 1)
