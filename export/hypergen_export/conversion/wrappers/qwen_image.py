"""Wrappers of Qwen-Image: the transformer, and the VAE for video, which has one frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from hypergen_export.conversion.wrappers.rotary import JointAttention, RotaryTables, grid, pack, unpack
from hypergen_export.conversion.wrappers.vae import to_image, to_pixels

# Positions of an axis: the image's are around 0, the prompt's follow. Images of 16,384 pixels.
_FIRST, _POSITIONS = -512, 2048


class _Attention(JointAttention):
    """Its blocks name the mask of text and image otherwise."""

    def __call__(  # noqa: PLR0913 - what diffusers passes
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        mask = attention_mask if encoder_hidden_states_mask is None else encoder_hidden_states_mask
        return super().__call__(attention, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


class QwenImage(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], text_mask [B, L] -> model_output as sample."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for module in transformer.modules():
            if type(module).__name__ == "Attention":
                module.set_processor(_Attention())
        self.transformer = transformer
        self.rotary = RotaryTables(transformer.config.axes_dims_rope, 10000.0, _POSITIONS, first=_FIRST)

    def forward(self, sample: Tensor, time: Tensor, encoder_hidden_states: Tensor, text_mask: Tensor) -> Tensor:
        model = self.transformer
        dtype = model.img_in.weight.dtype
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        batch, length = text_mask.shape
        rotary = self.rotary(*_positions(length, height, width))
        embedding = model.time_text_embed.timestep_embedder(time.to(dtype))
        image = model.img_in(pack(sample).to(dtype))
        text = model.txt_in(model.txt_norm(encoder_hidden_states.to(dtype)))
        mask = torch.cat([text_mask > 0, torch.ones(batch, height * width, dtype=torch.bool)], dim=1)
        for block in model.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                temb=embedding,
                image_rotary_emb=rotary,
            )
        output = model.proj_out(model.norm_out(image, embedding))
        return unpack(output, height, width).to(torch.float32)


def _positions(length: int, height: int, width: int) -> list[Tensor]:
    """Positions [1, L + h × w] on three axes: frame, row and column, which are counted from the image's centre.

    The prompt's tokens follow the largest of them on all axes.
    """
    rows, columns = grid(height, width)
    one = torch.ones(1, dtype=torch.int64)  # a maximum of symbolic sizes would be a branch
    tokens = torch.maximum(one * (height // 2), one * (width // 2)) + torch.arange(length)
    axes = (torch.zeros_like(rows), rows - (height - height // 2), columns - (width - width // 2))
    return [torch.cat([tokens, axis])[None] for axis in axes]


class QwenImageVaeDecoder(nn.Module):
    """latents [B, C, h, w], normalised per channel -> what `VaeDecoder` gives."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = _for_one_frame(vae)
        self.mean, self.std = _statistics(vae)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        frame = (latents * self.std + self.mean).to(self.vae.dtype)[:, :, None]
        # Called directly: `decode` keeps the features of the frames before.
        return to_image(self.vae.decoder(self.vae.post_quant_conv(frame))[:, :, 0])


class QwenImageVaeEncoder(nn.Module):
    """image [B, 8 h, 8 w, 3] uint8 -> mean and std [B, C, h, w] of the posterior, normalised per channel."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = _for_one_frame(vae)
        self.mean, self.std = _statistics(vae)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        frame = to_pixels(image).to(self.vae.dtype)[:, :, None]
        moments = self.vae.quant_conv(self.vae.encoder(frame))[:, :, 0].to(torch.float32)
        mean, log_variance = moments.chunk(2, dim=1)
        std = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()  # as DiagonalGaussianDistribution
        return (mean - self.mean) / self.std, std / self.std


class _OneFrameConv(nn.Module):
    """A causal convolution of one frame [B, C, 1, H, W]: the frames before are zeros, so only the last slice counts."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1].clone(), requires_grad=False)
        self.bias = conv.bias
        self.padding, self.stride = conv._padding[:4], conv.stride[1:]

    def forward(self, frames: Tensor) -> Tensor:
        return conv2d(pad(frames[:, :, 0], self.padding), self.weight, self.bias, self.stride)[:, :, None]


def _for_one_frame(vae: Any) -> Any:
    """The VAE with two-dimensional convolutions, a third of the weights."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if name == "time_conv":
                del module.time_conv  # not used for the first frame
            elif type(child).__name__ == "QwenImageCausalConv3d":
                setattr(module, name, _OneFrameConv(child))
    return vae


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1] of the latents."""
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
