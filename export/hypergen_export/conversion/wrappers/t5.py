"""Wrapper of T5's encoder: the model's own layers in a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of diffusers' pipelines.
_MAX_TOKENS = 512


class T5(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states [B, L, D].

    All tokens are attended to, padding included, unless an attention_mask [B, L] is given.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        stack = text_encoder.encoder
        self.embed_tokens, self.blocks, self.norm = stack.embed_tokens, stack.block, stack.final_layer_norm
        attention = stack.block[0].layer[0].SelfAttention
        self.bias = attention.relative_attention_bias
        # Constants, since their logarithms would be rounded in bfloat16.
        positions = torch.arange(_MAX_TOKENS)
        buckets = attention._relative_position_bucket(
            positions[None, :] - positions[:, None],
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length = input_ids.shape[1]
        bias = self.bias(self.get_buffer("buckets")[:length, :length]).permute(2, 0, 1)[None]
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(bias.dtype).min)
        states = self.embed_tokens(input_ids.to(torch.int64))
        for block in self.blocks:
            states = block(states, position_bias=bias)[0]
        output: Tensor = self.norm(states)
        return output.to(torch.float32)
