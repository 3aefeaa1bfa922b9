"""Wrappers of CLIP text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states [B, L, D], the normalised output of the last layer."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states: Tensor = self.text_encoder(input_ids.to(torch.int64), return_dict=False)[0]
        return hidden_states.to(torch.float32)


class PenultimateTextEncoder(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states [B, L, D], the input of the last layer."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.text_encoder(input_ids.to(torch.int64), output_hidden_states=True)
        hidden_states: Tensor = output.hidden_states[-2]
        return hidden_states.to(torch.float32)


class PooledTextEncoder(nn.Module):
    """input_ids [B, L] -> encoder_hidden_states as above, and text_embeds [B, P], the projected pooled output."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_encoder(input_ids.to(torch.int64), output_hidden_states=True)
        return output.hidden_states[-2].to(torch.float32), output.text_embeds.to(torch.float32)


class ClipPooled(nn.Module):
    """input_ids [B, L] -> text_embeds [B, P], the output at the end token."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        pooled: Tensor = self.text_encoder(input_ids.to(torch.int64)).pooler_output
        return pooled.to(torch.float32)
