"""Wrapper of Gemma 2 as a text encoder: the model's own layers in a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of SanaPipeline: the tokens whose hidden states the denoiser is given.
_TOKENS = 300
_MOST_POSITIONS = 2048


class Gemma2(nn.Module):
    """input_ids and attention_mask [B, L] -> encoder_hidden_states [B, 300, D] of the first and the last 299 tokens.

    Between these is the instruction before a prompt. A text without one is padded on the left to the same place.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        text_encoder.config._attn_implementation = "eager"  # the only one that caps the scores
        self.embed_tokens, self.blocks, self.norm = text_encoder.embed_tokens, text_encoder.layers, text_encoder.norm
        # Constants, in float32: their angles would be rounded in bfloat16.
        with torch.no_grad():
            positions = torch.arange(_MOST_POSITIONS)[None]
            cos, sin = text_encoder.rotary_emb(torch.zeros(1, 1, dtype=torch.float32), positions)
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        left_out = input_ids.shape[1] - _TOKENS
        has_instruction = attention_mask[:, :1] > 0
        states = self.embed_tokens(input_ids.to(torch.int64))
        index = torch.arange(input_ids.shape[1])[None]
        positions = torch.where(has_instruction, index, (index - left_out).clamp(min=0))
        rotary = tuple(self.get_buffer(name)[positions].to(states.dtype) for name in ("cos", "sin"))
        bias = _bias(attention_mask, states.dtype)
        for block in self.blocks:
            states = block(states, attention_mask=bias, position_embeddings=rotary)
        states = self.norm(states)
        first = torch.where(has_instruction[..., None], states[:, :1], states[:, left_out : left_out + 1])
        return torch.cat([first, states[:, left_out + 1 :]], dim=1).to(torch.float32)


def _bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores [B, 1, L, L]: tokens attend to those before them, padding at least to itself."""
    index = torch.arange(attention_mask.shape[1])
    before, own = index[None, :] < index[:, None], index[None, :] == index[:, None]
    visible = own | (before & (attention_mask > 0)[:, None, :])
    least = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(visible, torch.zeros((), dtype=dtype), least)[:, None]
