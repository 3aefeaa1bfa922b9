"""diffusers' pipelines for prompts that are longer than it reads: their chunks are encoded one by one and joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class ByChunks:
    """A pipeline that is called with prompts, and calls diffusers' with the hidden states of their chunks.

    `chunks` has each prompt's chunks as texts that diffusers reads whole.
    """

    def __init__(self, pipeline: Any, chunks: Mapping[str, tuple[str, ...]]) -> None:
        self._pipeline = pipeline
        self._chunks = chunks
        self.unet = pipeline.unet

    def __call__(self, *, prompt: str, negative_prompt: str | None = None, **fields: Any) -> Any:
        texts = {"": prompt} | ({} if negative_prompt is None else {"negative_": negative_prompt})
        chunks = max(len(self._chunks[text]) for text in texts.values())
        for side, text in texts.items():
            parts = [*self._chunks[text], *[""] * (chunks - len(self._chunks[text]))]
            encoded = [self._encode(part) for part in parts]
            fields[f"{side}prompt_embeds"] = torch.cat([states for states, _ in encoded], dim=1)
            if encoded[0][1] is not None:
                fields[f"{side}pooled_prompt_embeds"] = encoded[0][1]
        return self._pipeline(**fields)

    def _encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and pooled embedding, as the pipeline encodes a prompt."""
        given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states, _, *pooled = self._pipeline.encode_prompt(text, **given)
        return states, pooled[0] if pooled else None
