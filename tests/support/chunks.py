"""diffusers' pipelines for prompts that are longer than it reads: their chunks are encoded one by one and joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch

Syntax: TypeAlias = Literal["a1111", "compel"]
# Prompt -> the texts of its chunks, with the weights of the first tokens after the start.
WeightedChunks: TypeAlias = Mapping[str, tuple[tuple[str, tuple[float, ...]], ...]]


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


class ByWeightedChunks(ByChunks):
    """As `ByChunks`, with the hidden states weighted as by the tool whose syntax a prompt is in.

    stable-diffusion-webui's `FrozenCLIPEmbedderWithCustomWordsBase` multiplies those of each chunk by the weights of
    its tokens, and restores their mean. compel moves those with a weight above 1 away from those of an empty prompt.
    `clip_skip` as diffusers counts it.
    """

    def __init__(self, pipeline: Any, chunks: WeightedChunks, syntax: Syntax = "a1111", clip_skip: int = 0) -> None:
        self._weights = {text: weights for parts in chunks.values() for text, weights in parts}
        self._syntax = syntax
        self._clip_skip = clip_skip
        super().__init__(pipeline, {prompt: tuple(text for text, _ in parts) for prompt, parts in chunks.items()})

    def _encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The encoders' hidden states side by side: each is weighted by itself."""
        pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
        parts = [self._weighted(text, *pair) for pair in pairs if getattr(self._pipeline, pair[1], None) is not None]
        _, pooled = super()._encode(text)
        return torch.cat(parts, dim=-1), pooled

    def _weighted(self, text: str, tokenizer: str, encoder: str) -> torch.Tensor:
        states, weights = self._states(text, tokenizer, encoder), self._weights.get(text, ())
        factors = torch.ones(states.shape[1])
        factors[1 : 1 + len(weights)] = torch.tensor(weights)
        if self._syntax == "compel":
            empty = self._states("", tokenizer, encoder)
            return empty + (states - empty) * factors[None, :, None]
        scaled = states * factors[None, :, None]
        return scaled * (states.mean() / scaled.mean())

    def _states(self, text: str, tokenizer: str, encoder: str) -> torch.Tensor:
        tokenize, model = getattr(self._pipeline, tokenizer), getattr(self._pipeline, encoder)
        ids = tokenize(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
            if hasattr(self._pipeline, "text_encoder_2"):
                last_but_one: torch.Tensor = states[-(self._clip_skip + 2)]
                return last_but_one
            normalised: torch.Tensor = model.final_layer_norm(states[-(self._clip_skip + 1)])
            return normalised
