"""Wrappers of Qwen3 and Qwen2.5-VL as text encoders: the model's own layers, as far as they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# The tokens of QwenImagePipeline's template before the prompt. Its prompts are the longest.
_TEMPLATE_TOKENS = 34
_MAX_TOKENS = _TEMPLATE_TOKENS + 512


class _Qwen3States(nn.Module):
    """input_ids and attention_mask [B, L] -> the hidden states of `layers`, concatenated to [B, L, N × D].

    Index i is transformers' `hidden_states[i]`, the output of layer i - 1 before the final norm.
    """

    layers: ClassVar[Sequence[int]]

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        count = len(text_encoder.layers) + 1
        self._taken = [index % count for index in self.layers]
        self.embed_tokens = text_encoder.embed_tokens
        self.blocks = nn.ModuleList(text_encoder.layers[: max(self._taken)])
        # Constants of the longest prompt, in float32: their angles would be rounded in bfloat16.
        with torch.no_grad():
            positions = torch.arange(_MAX_TOKENS)[None]
            cos, sin = text_encoder.rotary_emb(torch.zeros(1, 1, dtype=torch.float32), positions)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        states = self.embed_tokens(input_ids.to(torch.int64))
        rotary = tuple(self.get_buffer(name)[:, :length].to(states.dtype) for name in ("cos", "sin"))
        index = torch.arange(length)
        visible = (index[None, :] <= index[:, None])[None, None] & (attention_mask > 0)[:, None, None, :]
        outputs = [states]
        for block in self.blocks:
            states = block(states, attention_mask=visible, position_embeddings=rotary)
            outputs.append(states)
        return torch.cat([outputs[index] for index in self._taken], dim=-1).to(torch.float32)


class Flux2TextEncoder(_Qwen3States):
    """As in Flux2KleinPipeline, which concatenates three layers."""

    layers = (9, 18, 27)


class ZImageTextEncoder(_Qwen3States):
    """As in ZImagePipeline, which takes the input of the last layer."""

    layers = (-2,)


class QwenImageTextEncoder(_Qwen3States):
    """As in QwenImagePipeline, which takes the normalised output of Qwen2.5-VL without the template's first tokens."""

    layers = (-1,)

    def __init__(self, text_encoder: Any) -> None:
        super().__init__(text_encoder.model.language_model)
        self.norm = text_encoder.model.language_model.norm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.norm(super().forward(input_ids, attention_mask))
        return states[:, _TEMPLATE_TOKENS:].to(torch.float32)
