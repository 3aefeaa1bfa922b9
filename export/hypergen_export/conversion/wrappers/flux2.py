"""Wrappers of FLUX.2: the transformer on packed latents, and the VAE, whose latents are packed and normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypergen_export.conversion.wrappers.rotary import (
    JointAttention,
    RotaryTables,
    attend,
    grid,
    rotate,
    with_references,
)
from hypergen_export.conversion.wrappers.vae import to_image, to_pixels

# Positions of an axis: images of 16,384 pixels.
_POSITIONS = 1024


class _ParallelAttention:
    """Processor of a block with one stream, which computes attention and feed-forward layer side by side."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        projected = attention.to_qkv_mlp_proj(hidden_states)
        qkv, mlp = projected[..., : 3 * attention.inner_dim], projected[..., 3 * attention.inner_dim :]
        query, key, value = (each.unflatten(-1, (-1, attention.head_dim)) for each in qkv.chunk(3, dim=-1))
        query = rotate(attention.norm_q(query), *image_rotary_emb)
        key = rotate(attention.norm_k(key), *image_rotary_emb)
        both = torch.cat([attend(query, key, value, attention_mask), attention.mlp_act_fn(mlp)], dim=-1)
        output: Tensor = attention.to_out(both)
        return output


_PROCESSORS = {"Flux2Attention": JointAttention, "Flux2ParallelSelfAttention": _ParallelAttention}


class Flux2(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], references -> model_output [B, C, h, w].

    A latent pixel is a token, 16 pixels wide and high. All L tokens of the prompt are attended to, padding included.
    Reference images are N tokens, none or more: references [B, N, C] and reference_positions [B, N, 3], the image
    (10 for the first, 20 for the second, …), row and column of each.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for module in transformer.modules():
            if type(module).__name__ in _PROCESSORS:
                module.set_processor(_PROCESSORS[type(module).__name__]())
        self.transformer = transformer
        config = transformer.config
        self.rotary = RotaryTables(config.axes_dims_rope, float(config.rope_theta), _POSITIONS)

    def forward(
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        references: Tensor,
        reference_positions: Tensor,
    ) -> Tensor:
        model = self.transformer
        dtype = model.x_embedder.weight.dtype
        height, width = sample.shape[2:]
        length = encoder_hidden_states.shape[1]
        rotary = self.rotary(*with_references(_positions(length, height, width), reference_positions))
        # Called directly, since diffusers would cast the sinusoids to the dtype of the timestep.
        embedding = model.time_guidance_embed.timestep_embedder(time.to(dtype))
        tokens = torch.cat([sample.flatten(2).transpose(1, 2), references], dim=1)
        image = model.x_embedder(tokens.to(dtype))
        text = model.context_embedder(encoder_hidden_states.to(dtype))
        modulation = (model.double_stream_modulation_img(embedding), model.double_stream_modulation_txt(embedding))
        for block in model.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb_mod_img=modulation[0],
                temb_mod_txt=modulation[1],
                image_rotary_emb=rotary,
            )
        joint = torch.cat([text, image], dim=1)
        single = model.single_stream_modulation(embedding)
        for block in model.single_transformer_blocks:
            joint = block(hidden_states=joint, encoder_hidden_states=None, temb_mod=single, image_rotary_emb=rotary)
        own = joint[:, length : length + height * width]
        output = model.proj_out(model.norm_out(own, embedding))
        latents: Tensor = output.transpose(1, 2).unflatten(2, (height, width))
        return latents.to(torch.float32)


def _positions(length: int, height: int, width: int) -> list[Tensor]:
    """Positions [1, L + h × w] on four axes: image, row, column and token of the prompt."""
    tokens = torch.arange(length)
    no_text, no_image = torch.zeros_like(tokens), torch.zeros(height * width, dtype=torch.int64)
    rows, columns = grid(height, width)
    axes = ((no_text, no_image), (no_text, rows), (no_text, columns), (tokens, no_image))
    return [torch.cat(axis)[None] for axis in axes]


class Flux2VaeDecoder(nn.Module):
    """latents [B, 4 × C, h, w], packed and normalised by the VAE's batch norm -> as of `VaeDecoder`, 16 h × 16 w."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.mean, self.std = _statistics(vae)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        channels, height, width = latents.shape[1:]
        packed = (latents * self.std + self.mean).unflatten(1, (channels // 4, 2, 2))
        unpacked = packed.permute(0, 1, 4, 2, 5, 3).reshape(-1, channels // 4, 2 * height, 2 * width)
        return to_image(self.vae.decode(unpacked.to(self.vae.dtype), return_dict=False)[0])


class Flux2VaeEncoder(nn.Module):
    """image [B, 16 h, 16 w, 3] uint8 -> mean and std [B, 4 × C, h, w] of the posterior, packed and normalised."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.mean, self.std = _statistics(vae)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(to_pixels(image).to(self.vae.dtype), return_dict=False)[0]
        return (_pack(posterior.mean) - self.mean) / self.std, _pack(posterior.std) / self.std


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, 4 × C, 1, 1] of the packed latents, in float32."""
    norm = vae.bn
    variance = norm.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return norm.running_mean.float().view(1, -1, 1, 1), variance.sqrt()


def _pack(latents: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] -> [B, 4 × C, h, w] in float32; each channel's four pixels become neighbouring channels."""
    _, channels, height, width = latents.shape
    pixels = latents.float().reshape(-1, channels, height // 2, 2, width // 2, 2)
    return pixels.permute(0, 1, 3, 5, 2, 4).reshape(-1, channels * 4, height // 2, width // 2)
