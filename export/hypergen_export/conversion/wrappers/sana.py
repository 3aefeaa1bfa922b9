"""Wrappers of Sana: the transformer, and the deep compression autoencoder (DC-AE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hypergen_export.conversion.wrappers.rotary import attend, split_heads
from hypergen_export.conversion.wrappers.vae import TinyVaeEncoder, VaeDecoder

# Of diffusers' attention, which adds it. OpenVINO leaves out the addition of so little.
_LEAST = 1e-15
_LARGEST_FLOAT16 = 65504


def attend_linearly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of heads [B, H, D, N] whose scores are products of what is positive in query and key, in float32.

    The scores' sum is what a value of 1 would become. Where it is 0, so is the output.
    """
    query, key = query.relu().to(torch.float32), key.relu().to(torch.float32)
    states = torch.matmul(pad(value.to(torch.float32), (0, 0, 0, 1), value=1.0), key.transpose(-1, -2))
    output = torch.matmul(states, query)
    return output[:, :, :-1] / output[:, :, -1:].clamp(min=_LEAST)


class _SelfAttention:
    """Processor of linear attention."""

    def __call__(self, attention: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        query, key = attention.to_q(hidden_states), attention.to_k(hidden_states)
        if attention.norm_q is not None:
            query, key = attention.norm_q(query), attention.norm_k(key)
        value = attention.to_v(hidden_states)
        heads = (each.transpose(1, 2).unflatten(1, (attention.heads, -1)) for each in (query, key, value))
        attended = attend_linearly(*heads).flatten(1, 2).transpose(1, 2)
        output: Tensor = attention.to_out[0](attended.to(hidden_states.dtype))
        return output.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16) if output.dtype == torch.float16 else output


class _CrossAttention:
    """Processor with a mask [B, L] that is true for the tokens to attend to."""

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> Tensor:
        query, key = attention.to_q(hidden_states), attention.to_k(encoder_hidden_states)
        if attention.norm_q is not None:
            query, key = attention.norm_q(query), attention.norm_k(key)
        value = attention.to_v(encoder_hidden_states)
        query, key, value = (split_heads(features, attention) for features in (query, key, value))
        output: Tensor = attention.to_out[0](attend(query, key, value, attention_mask))
        return output


class Sana(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], text_mask [B, L] -> model_output as sample.

    Sana-Sprint's is also given the embedded guidance scale [B, T]. A token is a latent pixel. It has no position:
    convolutions tell tokens apart.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(_SelfAttention())
            block.attn2.set_processor(_CrossAttention())
        self.transformer = transformer

    def forward(
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        text_mask: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        model = self.transformer
        dtype = model.proj_out.weight.dtype
        height, width = sample.shape[2:]
        image = model.patch_embed.proj(sample.to(dtype)).flatten(2).transpose(1, 2)
        if guidance is None:
            embedding = model.time_embed.emb.timestep_embedder(time.to(dtype))
        else:
            embedding = model.time_embed.timestep_embedder(time.to(dtype))
            embedding = embedding + model.time_embed.guidance_embedder(guidance.to(dtype))
        modulation = model.time_embed.linear(model.time_embed.silu(embedding))
        text = model.caption_norm(model.caption_projection(encoder_hidden_states.to(dtype)))
        for block in model.transformer_blocks:
            image = block(image, None, text, text_mask > 0, modulation, height, width)
        output = model.proj_out(model.norm_out(image, embedding, model.scale_shift_table))
        latents: Tensor = output.transpose(1, 2).unflatten(2, (height, width))
        return latents.to(torch.float32)


class DcVaeDecoder(VaeDecoder):
    """As `VaeDecoder`, by an AutoencoderDC."""

    def __init__(self, vae: Any) -> None:
        super().__init__(_of_any_size(vae))


class DcVaeEncoder(TinyVaeEncoder):
    """As `TinyVaeEncoder`, by an AutoencoderDC, whose latents are exact, too."""

    def __init__(self, vae: Any) -> None:
        super().__init__(_of_any_size(vae))


class _MultiscaleAttention:
    """Processor of linear attention for images of all sizes. diffusers multiplies small ones in another order."""

    def __call__(self, attention: Any, hidden_states: Tensor) -> Tensor:
        features = hidden_states.movedim(1, -1)
        projections = (attention.to_q, attention.to_k, attention.to_v)
        joined = torch.cat([project(features) for project in projections], dim=3).movedim(-1, 1)
        scales = torch.cat([joined, *(project(joined) for project in attention.to_qkv_multiscale)], dim=1)
        heads = scales.flatten(2).unflatten(1, (-1, 3 * attention.attention_head_dim))
        attended = attend_linearly(*heads.chunk(3, dim=2)).flatten(1, 2).to(hidden_states.dtype)
        output = attention.to_out(attended.unflatten(2, hidden_states.shape[2:]).movedim(1, -1))
        normed: Tensor = attention.norm_out(output).movedim(-1, 1)
        return normed + hidden_states


def _of_any_size(vae: Any) -> Any:
    for module in vae.modules():
        if type(module).__name__ == "SanaMultiscaleLinearAttention":
            module.processor = _MultiscaleAttention()
    return vae
