"""Modules of a checkpoint with the inputs and outputs of the repository's contract.

Each wrapper takes a loaded module of transformers or diffusers and does inside the graph what diffusers' pipeline
does around it, so that the sampler exchanges finished tensors and a picture leaves the decoder as bytes. Floats go
in and out as float32 whatever the module computes in: the casts are part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# No latent is divisible by 2**30, so a UNet that believes to have this many upsamplers takes, for every size,
# diffusers' forward_upsample_size path: each upsampler is told the size of the skip connection it must meet.
# The other path doubles sizes blindly and is right only for multiples of 2**levels; a traced graph has just one.
_ALWAYS_FORWARD_UPSAMPLE_SIZE = 30


class TextEncoder(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states [B, L, D], the last layer's, normalised: what the UNet attends to."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states: Tensor = self.text_encoder(input_ids.to(torch.int64), return_dict=False)[0]
        return hidden_states.to(torch.float32)


class UNet(nn.Module):
    """sample [B, C, h, w], timestep [B], encoder_hidden_states [B, L, D] -> model_output [B, C, h, w]."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        unet.num_upsamplers = _ALWAYS_FORWARD_UPSAMPLE_SIZE
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        # The timestep stays as it is: half precision holds few of the numbers up to 999, and its embedding is float32.
        dtype = self.unet.dtype
        model_output: Tensor = self.unet(
            sample.to(dtype), timestep, encoder_hidden_states.to(dtype), return_dict=False
        )[0]
        return model_output.to(torch.float32)


class VaeDecoder(nn.Module):
    """latents [B, C, h, w] as the scheduler leaves them -> image [B, H, W, 3] uint8."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        unscaled = (latents / self.scale + self.shift).to(self.vae.dtype)
        decoded: Tensor = self.vae.decode(unscaled, return_dict=False)[0].to(torch.float32)
        unit = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (unit * 255).round().to(torch.uint8)


class VaeEncoder(nn.Module):
    """image [B, H, W, 3] uint8 -> mean and std [B, C, h, w] of the posterior, in the scheduler's scale."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # Cast first: of bytes, TensorRT knows nothing but the cast.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 255 * 2 - 1
        posterior = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0]
        mean, std = posterior.mean.to(torch.float32), posterior.std.to(torch.float32)
        return (mean - self.shift) * self.scale, std * self.scale


# Component name -> its wrapper.
WRAPPERS: Mapping[str, Callable[[Any], nn.Module]] = {
    "text_encoder": TextEncoder,
    "unet": UNet,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
}
