"""Rotary position embeddings (Su et al., 2021) and token layouts that transformers' wrappers share.

Cosines and sines are looked up in float32 tables by integer positions: computed in the graph, their angles would be
rounded in bfloat16. The tables are built from float64 angles, as in diffusers. Rotations are real: the complex numbers
of diffusers' own processors have no ONNX operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention


class RotaryTables(nn.Module):
    """Cosines and sines of `length` positions from `first` on.

    Args:
        dims: for each axis of positions, how many features of a head it rotates.
        theta: the base of the frequencies.
        length: the number of positions of each axis.
        first: the first of them.
    """

    def __init__(self, dims: Sequence[int], theta: float, length: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        positions = torch.arange(first, first + length, dtype=torch.float64)[:, None]
        for axis, dim in enumerate(dims):
            frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = positions * frequencies.float().double()
            self.register_buffer(f"cos_{axis}", angles.cos().float(), persistent=False)
            self.register_buffer(f"sin_{axis}", angles.sin().float(), persistent=False)

    def forward(self, *positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, 1, D / 2] of int64 positions [B, S] per axis; D is a head's number of features."""
        return self._look_up("cos", positions), self._look_up("sin", positions)

    def _look_up(self, name: str, positions: Sequence[Tensor]) -> Tensor:
        values = [self.get_buffer(f"{name}_{axis}")[each - self.first] for axis, each in enumerate(positions)]
        return torch.cat(values, dim=-1)[:, :, None]


def rotate(features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the features [B, S, H, D] of each head, in float32."""
    first, second = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(features.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of heads [B, S, H, D]; returns [B, S, H × D].

    `mask` [B, S] is true for the keys to attend to; or it is what is added to the scores [B, 1, S, S].
    """
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    visible = mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
    return scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)


def split_heads(features: Tensor, attention: Any) -> Tensor:
    """[B, S, H × D] -> [B, S, H, D] for one of diffusers' attention modules."""
    heads: Tensor = features.unflatten(-1, (attention.heads, -1))
    return heads


def from_patches(tokens: Tensor, height: int, width: int) -> Tensor:
    """Patches of 2 × 2 pixels with C channels each, [B, height × width, 4 × C] -> latents [B, C, 2 height, 2 width]."""
    patches = tokens.unflatten(-1, (2, 2, -1)).unflatten(1, (height, width))
    latents: Tensor = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return latents


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column [height × width] of each token of an image, int64."""
    rows = torch.arange(height)[:, None].expand(height, width).reshape(-1)
    columns = torch.arange(width)[None, :].expand(height, width).reshape(-1)
    return rows, columns


def with_references(positions: Sequence[Tensor], references: Tensor) -> list[Tensor]:
    """Positions [1, S] on each axis, followed by those of reference images: [B, S + N].

    `references` [B, N, 3] are image, row and column; on further axes, they are at 0.
    """
    batch = references.shape[0]
    added = pad(references.to(torch.int64), (0, len(positions) - references.shape[-1])).unbind(-1)
    return [torch.cat([axis.expand(batch, -1), more], dim=1) for axis, more in zip(positions, added, strict=True)]


class JointAttention:
    """Processor of blocks with separate streams for text and image, which attend to each other."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(features: Tensor) -> Tensor:
            return split_heads(features, attention)

        text, image = encoder_hidden_states, hidden_states
        query = torch.cat(
            [attention.norm_added_q(heads(attention.add_q_proj(text))), attention.norm_q(heads(attention.to_q(image)))],
            dim=1,
        )
        key = torch.cat(
            [attention.norm_added_k(heads(attention.add_k_proj(text))), attention.norm_k(heads(attention.to_k(image)))],
            dim=1,
        )
        value = torch.cat([heads(attention.add_v_proj(text)), heads(attention.to_v(image))], dim=1)
        joint = attend(rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb), value, attention_mask)
        length = text.shape[1]
        return attention.to_out[0](joint[:, length:]), attention.to_add_out(joint[:, :length])


def pack(latents: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] -> tokens [B, h × w, 4 × C]; each channel's four pixels become neighbouring features."""
    batch, channels, height, width = latents.shape
    pixels = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return pixels.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for tokens of `height` × `width`."""
    batch, _, features = tokens.shape
    pixels = tokens.reshape(batch, height, width, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(batch, features // 4, height * 2, width * 2)
