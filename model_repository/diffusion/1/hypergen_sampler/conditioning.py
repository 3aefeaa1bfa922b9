"""The denoiser's inputs beside latents and timestep: the prompt's embeddings, the image's size, the guidance scale.

Follows diffusers' pipelines. Only the inputs that the checkpoint's denoiser has are computed. Every array has two rows
with classifier-free guidance, the negative one first, else one; three where guidance is by an image, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypergen_sampler.lora import LORA_SCALES
from hypergen_sampler.prompt_weights import Weights, WeightsOverflowError
from hypergen_sampler.prompts import ATTENTION_MASK, EncoderInputs, Tokens
from hypergen_sampler.references import REFERENCES, reference_tokens
from hypergen_sampler.request import Architecture, InvalidInputError, Request, TextInput

Array = npt.NDArray[np.float32]
Conditioning = Mapping[str, npt.NDArray[Any]]

# The denoiser's outputs; the second is an input of the shallow denoiser.
MODEL_OUTPUT = "model_output"
DEEP_FEATURES = "deep_features"
HIDDEN_STATES = "encoder_hidden_states"
POOLED = "text_embeds"
TEXT_MASK = "text_mask"
# Of inpainting models: the mask and the latents of the image without what is repainted [1 + C, h, w]. Its posterior is
# sampled, so it differs between the images of a request.
MASKED_IMAGE = "masked_image"
# Of models that edit by instruction: the latents of the image to edit.
IMAGE_LATENTS = "image_latents"
# Whether a row leaves out the layers that skip-layer guidance is about.
SKIP = "skip"


def texts_of(request: Request, architecture: Architecture) -> list[str]:
    """The texts to encode for this request."""
    if not architecture.guides(request) or _uses_zeros(request, architecture):
        return [request.prompt]
    return [request.negative_prompt or "", request.prompt]


def merge(
    answers: Sequence[Mapping[str, Array]], tokens: Tokens, architecture: Architecture
) -> dict[str, npt.NDArray[Any]]:
    """Merge the text encoders' outputs for the tokens of T texts, in the order of `text_inputs`.

    Hidden states [T × chunks, L, D] become [T, chunks × L, D], and pooled embeddings are those of a text's first chunk,
    as in stable-diffusion-webui and compel. Hidden states of a segment are concatenated along the features, segments
    along the tokens after padding the features with zeros (as in StableDiffusion3Pipeline); pooled embeddings [T, P]
    along the features. The mask [T, L] is that of the text encoder which takes one, without the tokens for which it has
    no hidden states.
    """
    segments: dict[int, list[Array]] = defaultdict(list)
    for text, answer, weights in zip(architecture.text_inputs, answers, tokens.weights, strict=True):
        if text.segment is not None:
            segments[text.segment].append(_join_chunks(_weighted(answer[HIDDEN_STATES], weights), tokens.chunks))
    joined = [np.concatenate(segments[number], axis=-1) for number in sorted(segments)]
    width = max(states.shape[-1] for states in joined)
    padded = [np.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1]))) for states in joined]
    states = np.concatenate(padded, axis=1)
    merged: dict[str, npt.NDArray[Any]] = {HIDDEN_STATES: states}
    if TEXT_MASK in architecture.denoiser_inputs:
        (mask,) = (given[ATTENTION_MASK] for given in tokens.inputs if ATTENTION_MASK in given)
        merged[TEXT_MASK] = mask[:, -states.shape[1] :]
    if POOLED in architecture.denoiser_inputs:
        rows = len(states) * tokens.chunks  # without those of weights
        pooled = [answer[POOLED][: rows : tokens.chunks] for answer in answers if POOLED in answer]
        merged[POOLED] = np.concatenate(pooled, axis=-1)
    return merged


def _weighted(states: Array, weights: Weights | None) -> Array:
    try:
        return states if weights is None else weights.apply(states)
    except WeightsOverflowError:
        raise InvalidInputError("prompt", "has weights, or its negative prompt has, that are too large") from None


def _join_chunks(states: Array, chunks: int) -> Array:
    rows, length, width = states.shape
    return states.reshape(rows // chunks, chunks * length, width)


def conditioning_of(
    request: Request,
    texts: Conditioning,
    architecture: Architecture,
    references: Sequence[Array] = (),
    edited: Array | None = None,
) -> Conditioning:
    """The denoiser's inputs for this request, by name.

    `texts` are the merged encodings of `texts_of(request)`, `references` the latents [C, h, w] of its reference images,
    `edited` those of the image that is edited by instruction. Without those inputs that each image has of its own
    (`Start.conditions`).
    """
    if architecture.guides(request) and _uses_zeros(request, architecture):
        texts = {name: np.concatenate([np.zeros_like(array), array]) for name, array in texts.items()}
    if edited is not None and architecture.guides(request):
        # Without both, with the image alone, with both.
        texts = {name: array[[0, 0, 1]] for name, array in texts.items()}
    rows = len(texts[HIDDEN_STATES])
    takes_references = REFERENCES in architecture.denoiser_inputs
    tokens = reference_tokens(references, architecture) if takes_references else {}

    def rows_of(name: str) -> npt.NDArray[Any]:
        if name in texts:
            return texts[name]
        if name == IMAGE_LATENTS:
            assert edited is not None
            return np.stack([np.zeros_like(edited), edited, edited][-rows:])
        return _repeat(tokens[name] if name in tokens else _MADE[name](request, architecture), rows)

    return {name: rows_of(name) for name in architecture.denoiser_inputs if name != MASKED_IMAGE}


def _uses_zeros(request: Request, architecture: Architecture) -> bool:
    return request.negative_prompt is None and bool(architecture.zeros_for_no_negative_prompt)


def _size_embeds(request: Request, architecture: Architecture) -> Array:
    """Original size, crop offsets and target size, with the defaults of StableDiffusionXLPipeline."""
    size = (request.height, request.width)
    return architecture.size_embedding([*size, 0, 0, *size]).reshape(-1)


def _consistency_guidance(request: Request, architecture: Architecture) -> Array:
    """The embedding of the guidance scale: diffusers' `get_guidance_scale_embedding`, in its own float32 arithmetic."""
    half = architecture.guidance_width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = torch.tensor(request.guidance_scale - 1.0) * 1000.0 * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return np.pad(embedding.numpy(), (0, architecture.guidance_width % 2))


def _guidance(request: Request, architecture: Architecture) -> Array:
    """The embedding of the guidance scale."""
    return architecture.guidance_embedding([architecture.guidance_factor * request.guidance_scale]).reshape(-1)


def _lora_scales(request: Request, _: Architecture) -> Array:
    return np.array(request.loras.scales, dtype=np.float32)


def _skip(_: Request, __: Architecture) -> npt.NDArray[np.int32]:
    return np.zeros(1, dtype=np.int32)


def with_lora_scales(inputs: EncoderInputs, text: TextInput, request: Request) -> EncoderInputs:
    """A text encoder's inputs [B, …] with the scales [B, R] of the request's LoRAs, if it has a rank pool."""
    if LORA_SCALES not in text.inputs:
        return inputs
    rows = len(next(iter(inputs.values())))
    return {**inputs, LORA_SCALES: np.tile(np.array(request.loras.scales, dtype=np.float32), (rows, 1))}


_MADE: Mapping[str, Callable[[Request, Architecture], npt.NDArray[Any]]] = {
    "size_embeds": _size_embeds,
    "timestep_cond": _consistency_guidance,
    "guidance": _guidance,
    LORA_SCALES: _lora_scales,
    SKIP: _skip,
}


def _repeat(row: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    return np.repeat(row[None], rows, axis=0)
