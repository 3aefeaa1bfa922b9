"""Wrapper of Z-Image's transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypergen_export.conversion.wrappers.rotary import RotaryTables, attend, from_patches, grid, rotate, split_heads

# Text and image are padded to multiples of it with learnt tokens, which are attended to.
_MULTIPLE = 32
_PATCH = "2-1"  # the only patch size of published checkpoints: 2 × 2 latent pixels of one frame


class _Attention:
    """Processor with real rotations; `freqs_cis` are cosines and sines."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,  # noqa: ARG002 - diffusers passes it
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        query = attention.norm_q(split_heads(attention.to_q(hidden_states), attention))
        key = attention.norm_k(split_heads(attention.to_k(hidden_states), attention))
        value = split_heads(attention.to_v(hidden_states), attention)
        joint = attend(rotate(query, *freqs_cis), rotate(key, *freqs_cis), value, attention_mask)
        output: Tensor = attention.to_out[0](joint)
        return output


class ZImage(nn.Module):
    """sample [B, C, h, w], time [B, T], encoder_hidden_states [B, L, D], text_mask [B, L] -> model_output [B, C, h, w].

    `time` embeds 1000 minus the timestep, as in ZImagePipeline. Its negation of the output is part of the graph.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for module in transformer.modules():
            if type(module).__name__ == "Attention":
                module.set_processor(_Attention())
        self.transformer = transformer
        config = transformer.config
        self.rotary = RotaryTables(config.axes_dims, config.rope_theta, max(config.axes_lens))

    def forward(self, sample: Tensor, time: Tensor, encoder_hidden_states: Tensor, text_mask: Tensor) -> Tensor:
        model = self.transformer
        dtype = model.all_x_embedder[_PATCH].weight.dtype
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        tokens = height * width
        embedding = model.t_embedder.mlp(time.to(dtype))
        # A prompt's tokens and its learnt padding are attended to, the rest of the row is not.
        mask = text_mask.to(torch.int64)
        visible_text = (mask.sum(1) + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
        text, text_mask, text_rotary = self._refined_text(encoder_hidden_states, mask, visible_text)
        image, image_mask, image_rotary = self._refined_image(sample, visible_text, embedding)
        joint = torch.cat([image, text], dim=1)
        joint_mask = torch.cat([image_mask, text_mask], dim=1)
        rotary = tuple(torch.cat(pair, dim=1) for pair in zip(image_rotary, text_rotary, strict=True))
        for layer in model.layers:
            joint = layer(joint, joint_mask, rotary, embedding)
        output = model.all_final_layer[_PATCH](joint[:, :tokens], c=embedding)
        return -from_patches(output, height, width).to(torch.float32)

    def _refined_text(self, states: Tensor, mask: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Tokens [B, L, D] of the prompt, which of them are visible [B, L], and their rotary embeddings."""
        model = self.transformer
        batch, length = mask.shape
        index = torch.arange(length)[None].expand(batch, -1)
        visible_mask = index < visible[:, None]
        embedded = model.cap_embedder(states.to(model.cap_pad_token.dtype))
        text = torch.where(mask[..., None] > 0, embedded, model.cap_pad_token)
        zeros = torch.zeros_like(index)
        rotary = self.rotary(index + 1, zeros, zeros)
        for layer in model.context_refiner:
            text = layer(text, visible_mask, rotary)
        return text, visible_mask, rotary

    def _refined_image(self, sample: Tensor, visible_text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Tokens [B, S, D] of the image and its padding, which of them are visible [B, S], and rotary embeddings.

        There is always the longest padding, since its length depends on the image's size; the surplus is masked.
        """
        model = self.transformer
        embed = model.all_x_embedder[_PATCH]
        batch, channels = sample.shape[:2]
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        tokens, padding = height * width, _MULTIPLE - 1
        patches = sample.reshape(batch, channels, height, 2, width, 2).permute(0, 2, 4, 3, 5, 1)
        embedded = embed(patches.reshape(batch, tokens, 4 * channels).to(embed.weight.dtype))
        image = torch.cat([embedded, model.x_pad_token[None].expand(batch, padding, -1)], dim=1)
        rows, columns = (each[None].expand(batch, -1) for each in grid(height, width))
        # Images follow the prompt on the first axis; padding is at position 0 of all.
        frame = (visible_text + 1)[:, None].expand(batch, tokens)
        zeros = torch.zeros(batch, padding, dtype=torch.int64)
        rotary = self.rotary(*(torch.cat([axis, zeros], dim=1) for axis in (frame, rows, columns)))
        visible = (tokens + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
        mask = (torch.arange(tokens + padding) < visible)[None].expand(batch, -1)
        for layer in model.noise_refiner:
            image = layer(image, mask, rotary, embedding)
        return image, mask, rotary
