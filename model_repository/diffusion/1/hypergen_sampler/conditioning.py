"""The denoiser's inputs beside latents and timestep: the prompt's embeddings, the image's size, the guidance scale.

Follows diffusers' pipelines. Only the inputs that the checkpoint's denoiser has are computed. Every array has two rows
with classifier-free guidance, the negative one first, else one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from hypergen_sampler.request import Architecture, Request

Array = npt.NDArray[np.float32]
Conditioning = Mapping[str, Array]

# The denoiser's outputs; the second is an input of the shallow denoiser.
MODEL_OUTPUT = "model_output"
DEEP_FEATURES = "deep_features"
HIDDEN_STATES = "encoder_hidden_states"
POOLED = "text_embeds"


def texts_of(request: Request, architecture: Architecture) -> list[str]:
    """The texts to encode for this request."""
    if not architecture.guides(request) or _uses_zeros(request, architecture):
        return [request.prompt]
    return [request.negative_prompt or "", request.prompt]


def outputs_of(architecture: Architecture) -> list[list[str]]:
    """The outputs to request from each text encoder."""
    pooled = [name for name in architecture.denoiser_inputs if name == POOLED]
    return [*([HIDDEN_STATES] for _ in architecture.text_encoders[1:]), [HIDDEN_STATES, *pooled]]


def merge(answers: list[dict[str, Array]]) -> dict[str, Array]:
    """Merge the text encoders' outputs: hidden states [T, L, D] are concatenated, others come from the last encoder."""
    return {**answers[-1], HIDDEN_STATES: np.concatenate([answer[HIDDEN_STATES] for answer in answers], axis=-1)}


def conditioning_of(request: Request, texts: Mapping[str, Array], architecture: Architecture) -> Conditioning:
    """The denoiser's inputs for this request, by name; `texts` are the encoded `texts_of(request)`."""
    if architecture.guides(request) and _uses_zeros(request, architecture):
        texts = {name: np.concatenate([np.zeros_like(array), array]) for name, array in texts.items()}
    rows = len(texts[HIDDEN_STATES])
    return {
        name: texts[name] if name in texts else _repeat(_MADE[name](request, architecture), rows)
        for name in architecture.denoiser_inputs
    }


def _uses_zeros(request: Request, architecture: Architecture) -> bool:
    return request.negative_prompt is None and bool(architecture.zeros_for_no_negative_prompt)


def _size_embeds(request: Request, architecture: Architecture) -> Array:
    """Original size, crop offsets and target size, with the defaults of StableDiffusionXLPipeline."""
    size = (request.height, request.width)
    return architecture.size_embedding([*size, 0, 0, *size]).reshape(-1)


def _guidance(request: Request, architecture: Architecture) -> Array:
    """The embedding of the guidance scale: diffusers' `get_guidance_scale_embedding`, in its own float32 arithmetic."""
    half = architecture.guidance_width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = torch.tensor(request.guidance_scale - 1.0) * 1000.0 * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return np.pad(embedding.numpy(), (0, architecture.guidance_width % 2))


_MADE: Mapping[str, Callable[[Request, Architecture], Array]] = {
    "size_embeds": _size_embeds,
    "timestep_cond": _guidance,
}


def _repeat(row: Array, rows: int) -> Array:
    return np.repeat(row[None], rows, axis=0)
