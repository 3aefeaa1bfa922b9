"""Wrappers of CLIP text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """input_ids and attention_mask [B, L], clip_skip [B, 1] -> encoder_hidden_states [B, L, D], normalised.

    They are the output of the last layer but `clip_skip`.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, clip_skip: Tensor) -> Tensor:
        output = self.text_encoder(input_ids.to(torch.int64), attention_mask, output_hidden_states=True)
        states = _skipped(output.hidden_states, clip_skip)
        # transformers normalises the last layer's output alone, diffusers' pipelines also that of an earlier one.
        hidden_states: Tensor = _final_norm(self.text_encoder)(states)
        return hidden_states.to(torch.float32)


class PenultimateTextEncoder(nn.Module):
    """input_ids and attention_mask [B, L], clip_skip [B, 1] -> encoder_hidden_states [B, L, D].

    They are the input of the last layer, or of one `clip_skip` layers before it.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, clip_skip: Tensor) -> Tensor:
        output = self.text_encoder(input_ids.to(torch.int64), attention_mask, output_hidden_states=True)
        return _skipped(output.hidden_states[:-1], clip_skip).to(torch.float32)


class PooledTextEncoder(nn.Module):
    """input_ids and attention_mask [B, L], clip_skip [B, 1] -> encoder_hidden_states as above, and text_embeds [B, P].

    The latter are the projected pooled output, whatever is skipped. Stable Diffusion 3 has neither mask nor skips.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, clip_skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = self.text_encoder(input_ids.to(torch.int64), attention_mask, output_hidden_states=True)
        *_, states, _ = output.hidden_states
        if clip_skip is not None:
            states = _skipped(output.hidden_states[:-1], clip_skip)
        return states.to(torch.float32), output.text_embeds.to(torch.float32)


def _skipped(hidden_states: tuple[Tensor, ...], clip_skip: Tensor) -> Tensor:
    """Of each row [L, D] the last of the hidden states but `clip_skip` [B, 1].

    A selection for each layer is exact, and no engine has to gather or to hold them all.
    """
    last, *others = reversed(hidden_states)
    for skip, states in enumerate(others, start=1):
        last = torch.where(clip_skip[:, :, None] == skip, states, last)
    return last


def _final_norm(text_encoder: Any) -> nn.Module:
    # Until transformers 5 it was a part of another module.
    norm: nn.Module = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    return norm


class ClipPooled(nn.Module):
    """input_ids [B, L] -> text_embeds [B, P], the output at the end token."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        pooled: Tensor = self.text_encoder(input_ids.to(torch.int64)).pooler_output
        return pooled.to(torch.float32)
