"""Wrapper of FLUX.1's transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypergen_export.conversion.wrappers.rotary import (
    JointAttention,
    RotaryTables,
    attend,
    grid,
    pack,
    rotate,
    split_heads,
    unpack,
    with_references,
)

# Positions of an axis: images of 16,384 pixels.
POSITIONS = 1024
THETA = 10000.0  # of FluxTransformer2DModel


class Attention:
    """Processor of both kinds of blocks: those with one stream attend within it, and have no output projection."""

    def __init__(self) -> None:
        self._joint = JointAttention()

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if encoder_hidden_states is not None:
            return self._joint(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query = attention.norm_q(split_heads(attention.to_q(hidden_states), attention))
        key = attention.norm_k(split_heads(attention.to_k(hidden_states), attention))
        value = split_heads(attention.to_v(hidden_states), attention)
        return attend(rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb), value, attention_mask)


class Flux1(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], text_embeds [B, P] -> model_output as sample.

    A guidance-distilled model also takes guidance [B, T], the embedding of 1000 times the guidance scale. A token is
    2 × 2 latent pixels. All L tokens of the prompt are attended to, padding included. FLUX.1-Kontext also takes N
    tokens of reference images, none or more: references [B, N, 4 × C] and reference_positions [B, N, 3], the image
    (1 for the first), row and column of each.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for module in transformer.modules():
            if type(module).__name__ == "FluxAttention":
                module.set_processor(Attention())
        self.transformer = transformer
        self.rotary = RotaryTables(transformer.config.axes_dims_rope, THETA, POSITIONS)

    def forward(  # noqa: PLR0913 - the denoiser's inputs
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        guidance: Tensor | None = None,
        references: Tensor | None = None,
        reference_positions: Tensor | None = None,
    ) -> Tensor:
        model = self.transformer
        dtype = model.x_embedder.weight.dtype
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        positions = positions_of(encoder_hidden_states.shape[1], height, width)
        tokens = pack(sample)
        if references is not None and reference_positions is not None:
            tokens = torch.cat([tokens, references], dim=1)
            positions = with_references(positions, reference_positions)
        rotary = self.rotary(*positions)
        # Called one by one, since diffusers would compute the sinusoids itself.
        embedders = model.time_text_embed
        embedding = embedders.timestep_embedder(time.to(dtype)) + embedders.text_embedder(text_embeds.to(dtype))
        if guidance is not None:
            embedding = embedding + embedders.guidance_embedder(guidance.to(dtype))
        image = model.x_embedder(tokens.to(dtype))
        text = model.context_embedder(encoder_hidden_states.to(dtype))
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb=embedding, image_rotary_emb=rotary
            )
        output = model.proj_out(model.norm_out(image[:, : height * width], embedding))
        return unpack(output, height, width).to(torch.float32)


def positions_of(length: int, height: int, width: int) -> list[Tensor]:
    """Positions [1, L + h × w] on three axes: always 0, row and column; those of the prompt are 0."""
    text = torch.zeros(length, dtype=torch.int64)
    rows, columns = grid(height, width)
    return [torch.cat([text, axis])[None] for axis in (torch.zeros_like(rows), rows, columns)]
