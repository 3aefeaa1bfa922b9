"""Wrapper of Chroma's transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hypergen_export.conversion.wrappers.flux1 import POSITIONS, THETA, Attention, positions_of
from hypergen_export.conversion.wrappers.rotary import RotaryTables, pack, unpack


class _BiasedAttention(Attention):
    """Processor with a bias in place of the mask, of which every block would make one of its own."""

    def __call__(  # type: ignore[override]
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        _: None,
        image_rotary_emb: Any,
        bias: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return super().__call__(attention, hidden_states, encoder_hidden_states, bias, image_rotary_emb)


class Chroma(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], text_mask [B, L] -> model_output as sample.

    A token is 2 × 2 latent pixels. One small network, the approximator, computes what modulates all layers.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for module in transformer.modules():
            if type(module).__name__ == "FluxAttention":
                module.set_processor(_BiasedAttention())
        for norm in transformer.distilled_guidance_layer.norms:
            norm.eps = torch.finfo(torch.float32).eps  # by default that of the precision: in bfloat16 0.008
        self.transformer = transformer
        self.rotary = RotaryTables(transformer.config.axes_dims_rope, THETA, POSITIONS)
        # Beside the time, the approximator is given a guidance scale, always 0, and which layer is modulated.
        embedders = transformer.time_text_embed
        guidance = embedders.guidance_proj(torch.zeros(1)).expand(len(embedders.mod_proj), -1)
        self.register_buffer("places", torch.cat([guidance, embedders.mod_proj], dim=1), persistent=False)

    def forward(self, sample: Tensor, time: Tensor, encoder_hidden_states: Tensor, text_mask: Tensor) -> Tensor:
        model = self.transformer
        dtype = model.x_embedder.weight.dtype
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        length = encoder_hidden_states.shape[1]
        modulation = self._modulation(time, dtype)
        image = model.x_embedder(pack(sample).to(dtype))
        text = model.context_embedder(encoder_hidden_states.to(dtype))
        given = {
            "image_rotary_emb": self.rotary(*positions_of(length, height, width)),
            "joint_attention_kwargs": {"bias": _bias(text_mask, height * width).to(dtype)},
        }
        singles, doubles = len(model.single_transformer_blocks), len(model.transformer_blocks)
        for index, block in enumerate(model.transformer_blocks):
            firsts = (3 * singles + 6 * index, 3 * singles + 6 * (doubles + index))
            embedding = torch.cat([modulation[:, first : first + 6] for first in firsts], dim=1)
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=embedding, **given)
        states = torch.cat([text, image], dim=1)
        for index, block in enumerate(model.single_transformer_blocks):
            states = block(hidden_states=states, temb=modulation[:, 3 * index : 3 * index + 3], **given)
        output = model.proj_out(model.norm_out(states[:, length:], modulation[:, -2:]))
        return unpack(output, height, width).to(torch.float32)

    def _modulation(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """Shifts, scales and gates [B, N, D] of all layers: of the single blocks, the double blocks, and the output."""
        places = self.get_buffer("places")
        count = places.shape[0]
        times = time[:, None].expand(-1, count, -1)
        inputs = torch.cat([times.to(dtype), places.to(dtype)[None].expand(time.shape[0], -1, -1)], dim=-1)
        modulation: Tensor = self.transformer.distilled_guidance_layer(inputs)
        return modulation


def _bias(text_mask: Tensor, image_tokens: int) -> Tensor:
    """What is added to the scores [B, 1, L + N, L + N]: 1 between tokens of the prompt, one of padding and the image.

    ChromaPipeline hands the mask to the attention as numbers, which are added instead of masking (diffusers' issue
    12116). So padding is attended to less than the rest, but is not left out.
    """
    length = text_mask.shape[1]
    kept = torch.arange(length)[None] <= text_mask.sum(dim=1, keepdim=True)
    all_kept = pad(kept.to(torch.float32), (0, image_tokens), value=1.0)
    return all_kept[:, None, :, None] * all_kept[:, None, None, :]
