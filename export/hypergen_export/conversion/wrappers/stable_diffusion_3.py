"""Wrapper of Stable Diffusion 3's transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hypergen_export.conversion.wrappers.rotary import from_patches
from hypergen_export.errors import ConversionError

# Zeros in place of T5's tokens, as in StableDiffusion3Pipeline.
_T5_TOKENS = 256


# The layers that StableDiffusion3Pipeline's documentation skips in Stable Diffusion 3.5 Medium.
_SKIPPED_LAYERS = (7, 8, 9)


class StableDiffusion3(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], text_embeds [B, P] -> model_output as sample.

    With skip [B, 1], rows where it is not 0 leave out some layers: of a shallow model, such as a cut one, the middle.
    `has_t5`: the prompt is also encoded by T5. Otherwise its hidden states are CLIP's alone, and are padded here.
    """

    def __init__(self, transformer: Any, *, has_t5: bool = True) -> None:
        super().__init__()
        self.transformer = transformer
        self.missing_tokens = 0 if has_t5 else _T5_TOKENS
        rows, columns = _separated(transformer.pos_embed)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        skip: Tensor | None = None,
    ) -> Tensor:
        model = self.transformer
        dtype = model.context_embedder.weight.dtype
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        patches = model.pos_embed.proj(sample.to(dtype)).flatten(2).transpose(1, 2)
        image = (patches + self._positions(height, width)).to(dtype)
        embed = model.time_text_embed
        embedding = embed.timestep_embedder(time.to(dtype)) + embed.text_embedder(text_embeds.to(dtype))
        missing_features = model.config.joint_attention_dim - encoder_hidden_states.shape[2]
        states = pad(encoder_hidden_states, (0, missing_features, 0, self.missing_tokens))
        text = model.context_embedder(states.to(dtype))
        depth = len(model.transformer_blocks)
        skipped = _SKIPPED_LAYERS if depth > max(_SKIPPED_LAYERS) + 1 else (depth // 2,)
        for index, block in enumerate(model.transformer_blocks):
            earlier = text, image
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=embedding)
            if skip is not None and index in skipped:
                is_skipped = (skip != 0)[:, :, None]
                text, image = torch.where(is_skipped, earlier[0], text), torch.where(is_skipped, earlier[1], image)
        output = model.proj_out(model.norm_out(image, embedding))
        return from_patches(output, height, width).to(torch.float32)

    def _positions(self, height: int, width: int) -> Tensor:
        """The position embedding [1, height × width, D], from the centre of the table."""
        columns, rows = self.get_buffer("columns"), self.get_buffer("rows")
        columns = columns[(len(columns) - width) // 2 + torch.arange(width)][None].expand(height, -1, -1)
        rows = rows[(len(rows) - height) // 2 + torch.arange(height)][:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]


def _separated(embedding: Any) -> tuple[Tensor, Tensor]:
    """The embeddings [N, D / 2] of rows and columns, which the table [1, N × N, D] combines, in float32.

    The table is taken from the module: it has 900 MB in Stable Diffusion 3.5 Medium. Raises ConversionError.
    """
    size = embedding.pos_embed_max_size
    table = embedding.pos_embed.float().unflatten(1, (size, size))[0]
    half = table.shape[-1] // 2
    columns, rows = table[0, :, :half].clone(), table[:, 0, half:].clone()
    if not (table[..., :half] == columns[None]).all() or not (table[..., half:] == rows[:, None]).all():
        raise ConversionError("transformer: its position embedding is no combination of rows and columns")
    embedding.pos_embed = None
    return rows, columns
