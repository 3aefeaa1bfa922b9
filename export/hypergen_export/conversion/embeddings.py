"""Vectors of textual inversions, and text encoders that know them.

The vectors are further rows of the table of token embeddings. They are a second, small table inside the graph: the
table itself stays a link to the checkpoint's file, which one with more rows would not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.embeddings import Embedding
from hypergen_export.checkpoints.lora import BUNDLED, bundled_part
from hypergen_export.errors import BadEmbeddingError, first_line

# Keys of SDXL's two text encoders in files of stable-diffusion-webui and of trainers.
_OF_MODULE = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def vectors_of(checkpoint: Checkpoint, embedding: Embedding) -> dict[str, Tensor]:
    """Text encoder's module -> the embedding's vectors [N, D] for it. Raises BadEmbeddingError."""
    widths = {
        encoder.module: int(checkpoint.config(encoder.module)["hidden_size"])
        for encoder in checkpoint.family.text_encoders
    }
    stored = _stored_vectors(embedding)
    given = ", ".join(str(vectors.shape[1]) for vectors in stored.values())
    if len(stored) != len(widths) or any(stored[module].shape[1] != width for module, width in widths.items()):
        taken = ", ".join(map(str, widths.values()))
        raise BadEmbeddingError(f"{embedding.file}: has vectors of {given} numbers, the model takes {taken}")
    counts = {len(vectors) for vectors in stored.values()}
    if len(counts) != 1 or not 1 <= max(counts) <= checkpoint.sizes["tokens"] - 2:
        raise BadEmbeddingError(f"{embedding.file}: has {given and max(counts)} vectors, more than a prompt's chunk")
    return stored


def extend(checkpoint: Checkpoint, module_name: str, module: Any) -> None:
    """Give a text encoder the vectors of the checkpoint's embeddings, as tokens after those of its vocabulary."""
    rows = [vectors_of(checkpoint, embedding)[module_name] for embedding in checkpoint.embeddings]
    module.set_input_embeddings(_ExtendedEmbedding(module.get_input_embeddings(), torch.cat(rows)))


class _ExtendedEmbedding(nn.Module):
    """A table of embeddings [V, D] that is continued by another one [N, D]."""

    more: Tensor

    def __init__(self, table: nn.Embedding, more: Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("more", more.to(table.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        last = self.table.num_embeddings - 1
        known = self.table(ids.clamp(max=last))
        learnt = nn.functional.embedding((ids - last - 1).clamp(min=0), self.more)
        return torch.where((ids > last)[..., None], learnt, known)


def _stored_vectors(embedding: Embedding) -> dict[str, Tensor]:
    """The file's vectors by module: of one text encoder, or of SDXL's two."""
    content = _content(embedding)
    if set(_OF_MODULE.values()) <= content.keys():
        found = {module: content[key] for module, key in _OF_MODULE.items()}
    elif "string_to_param" in content:  # stable-diffusion-webui's, pickled
        by_token = content["string_to_param"]
        found = {"text_encoder": next(iter(by_token.values()), None) if isinstance(by_token, dict) else None}
    elif "emb_params" in content:
        found = {"text_encoder": content["emb_params"]}
    elif len(content) == 1:  # diffusers': the token and its vectors
        found = {"text_encoder": next(iter(content.values()))}
    else:
        raise BadEmbeddingError(f"{embedding.file}: not a textual inversion of a known format")
    return {module: _checked(embedding, vectors) for module, vectors in found.items()}


def _checked(embedding: Embedding, vectors: object) -> Tensor:
    is_table = isinstance(vectors, Tensor) and vectors.ndim in (1, 2) and vectors.numel() > 0
    if not isinstance(vectors, Tensor) or not is_table or not vectors.is_floating_point():
        raise BadEmbeddingError(f"{embedding.file}: not a textual inversion of a known format")
    rows = vectors.detach().float().reshape(-1, vectors.shape[-1])
    if not rows.isfinite().all():
        raise BadEmbeddingError(f"{embedding.file}: its vectors are not finite")
    return rows


def _content(embedding: Embedding) -> Mapping[str, Any]:
    try:
        if embedding.is_bundled:
            return _bundled(embedding)
        if embedding.file.suffix == ".safetensors":
            content: Any = load_file(embedding.file)
        else:
            content = torch.load(embedding.file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and torch raise their own errors
        raise BadEmbeddingError(f"{embedding.file}: cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise BadEmbeddingError(f"{embedding.file}: not a textual inversion of a known format")
    return content


def _bundled(embedding: Embedding) -> Mapping[str, Any]:
    """The embedding's part of a LoRA's file, as a file of its own would have it."""
    stored: dict[str, Tensor] = {}
    with safe_open(embedding.file, "pt") as file:
        for weight in (weight for weight in file.keys() if weight.startswith(BUNDLED)):  # noqa: SIM118 - not a dict
            name, key = bundled_part(weight)
            if name == embedding.name:
                stored[key] = file.get_tensor(weight)
    of_webui = {token: vectors for token, vectors in stored.items() if token.startswith("string_to_param.")}
    return {"string_to_param": of_webui} if of_webui else stored
