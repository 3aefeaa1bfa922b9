"""From validated fields to the internal `ClientRequest`: fills in the model's defaults and what the client implies."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import numpy as np
from starlette.datastructures import Headers

from hypergen_gateway.api.client_hints import read_client
from hypergen_gateway.api.fields import ImageRequest, RequestBody, VariationForm
from hypergen_gateway.api.loras import requested_loras
from hypergen_gateway.api.scheduler_names import scheduler_of
from hypergen_gateway.api.validation import check_limits, requested_size
from hypergen_gateway.generation.backend import GenerationRequest, ModelDescription
from hypergen_gateway.generation.image_inputs import InitImage, InitImageOptions
from hypergen_gateway.generation.images import FileFormat
from hypergen_gateway.generation.request import Client, ClientRequest, Quality, SubRequest, split
from hypergen_gateway.generation.sizes import nearest_size

# Random seeds stay below 2^53: JavaScript rounds larger ones, and the image could not be reproduced.
_RANDOM_SEEDS = 2**53
# Enough for a different image, little enough to show the same thing.
_VARIATION_STRENGTH = 0.6
# The qualities of all of OpenAI's models, in the words of its schema for responses.
_QUALITIES: dict[str, Quality] = {
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
    "auto": "medium",
    "standard": "medium",
    "hd": "high",
}
_STEPS_BY_QUALITY: dict[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 1.5}
# OpenAI's models that answer with links by default.
_LINKING_MODELS = ("dall-e-2", "dall-e-3")
# Fields that the sampler gets as they are.
_UNCHANGED = (
    "negative_prompt",
    "image_guidance_scale",
    "guidance_start",
    "guidance_end",
    "guidance_rescale",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_start",
    "skip_layer_guidance_stop",
    "cache_interval",
    "timestep_spacing",
    "eta",
)
# Fields that hold files; the fingerprint covers their pixels instead.
_FILES = {"image", "images", "mask"}


def to_client_request(
    body: RequestBody, init_images: Sequence[InitImage], model: ModelDescription, headers: Headers, route: str
) -> ClientRequest:
    """The whole request. Hashes the init images if the client may return: large ones belong in a thread.

    Raises:
        InvalidRequestError: a field is beyond the model's limits, or the idempotency key is malformed.
    """
    client = read_client(headers)
    generation = to_generation_request(body, model, _seed(body, client))
    sub_requests = split(generation, init_images, requested_size(body))
    return ClientRequest(
        sub_requests=sub_requests,
        model=model,
        file_format=FileFormat(body.output_format, body.output_compression),
        operation="image_generation" if isinstance(body, ImageRequest) else "image_edit",
        quality=_QUALITIES[body.quality],
        stream=body.stream,
        links=_wants_links(body, client),
        deadline=_deadline(body, client),
        client=client,
        fingerprint=_fingerprint(route, body, sub_requests) if client.may_return else "",
    )


def init_image_options(body: RequestBody, model: ModelDescription) -> InitImageOptions:
    """How the uploads of a request become init images."""
    strength = _strength(body, model)
    return InitImageOptions(
        size=requested_size(body),
        count=body.n,
        keep_originals=strength is not None and strength * _num_inference_steps(body, model) < 1,
        are_references=strength is None and model.max_references > 0,
    )


def to_generation_request(body: RequestBody, model: ModelDescription, seed: int) -> GenerationRequest:
    """What the backend is asked for, before it is split by init images; `seed` is that of the first image."""
    size = requested_size(body)
    width, height = (model.default_width, model.default_height) if size is None else nearest_size(size, model)
    scheduler, sigmas = scheduler_of(body.scheduler)
    names, scales = requested_loras(body, model)
    generation = GenerationRequest(
        prompt=body.prompt,
        num_images=body.n,
        width=width,
        height=height,
        num_inference_steps=_num_inference_steps(body, model),
        guidance_scale=model.default_guidance_scale if body.guidance_scale is None else body.guidance_scale,
        seed=seed,
        partial_images=body.partial_images if body.stream else 0,
        strength=_strength(body, model),
        prompt_weighting=_prompt_weighting(body, model),
        clip_skip=_clip_skip(body, model),
        scheduler=scheduler,
        sigmas=body.sigmas or sigmas,
        lora=names,
        lora_scale=scales,
        **{name: getattr(body, name) for name in _UNCHANGED},
    )
    check_limits(generation, body, model)
    return generation


def _seed(body: RequestBody, client: Client) -> int:
    """The requested seed, or a random one; that of an idempotency key follows from it and the prompt.

    So a retry gets the same images from a gateway that does not know of the first attempt: from another one, or from
    this one after a restart. Not from the API key, which whoever sees a seed could guess offline.
    """
    if body.seed is not None and body.seed != -1:
        return body.seed
    seeds = _RANDOM_SEEDS - body.n
    if client.idempotency_key is None:
        return secrets.randbelow(seeds)
    digest = hashlib.sha256(f"{client.idempotency_key}\n{body.prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % seeds


def _num_inference_steps(body: RequestBody, model: ModelDescription) -> int:
    """The requested steps, or those of the quality."""
    if body.num_inference_steps is not None:
        return body.num_inference_steps
    steps = round(model.default_num_inference_steps * _STEPS_BY_QUALITY[_QUALITIES[body.quality]])
    return min(max(steps, 1), model.max_num_inference_steps)


def _prompt_weighting(body: RequestBody, model: ModelDescription) -> str | None:
    """The requested syntax, or the server's; None for no weights."""
    weighting = body.prompt_weighting or model.default_prompt_weighting
    return None if weighting == "none" else weighting


def _clip_skip(body: RequestBody, model: ModelDescription) -> int | None:
    """The requested number of layers, or the server's; None for models that skip none."""
    clip_skip = model.default_clip_skip if body.clip_skip is None else body.clip_skip
    return clip_skip if model.max_clip_skip else None


def _strength(body: RequestBody, model: ModelDescription) -> float | None:
    """The strength of an edit or variation; None leaves it to the model, or it has none."""
    if isinstance(body, ImageRequest) or model.edits_by_instruction:
        return None
    if isinstance(body, VariationForm) and body.strength is None:
        return max(_VARIATION_STRENGTH, 1 / _num_inference_steps(body, model))
    return body.strength


def _wants_links(body: RequestBody, client: Client) -> bool:
    """Whether the response links to the images; by default, as OpenAI's model of that name does."""
    if body.response_format is not None or body.stream:
        return body.response_format == "url"
    # OpenAI offers variations by one model only.
    model = body.model or ("dall-e-2" if isinstance(body, VariationForm) else None)
    return model in _LINKING_MODELS or (client.expects_links and not model)


def _deadline(body: RequestBody, client: Client) -> float | None:
    """Seconds within which the images are wanted; None if there is no limit.

    A client's read time-out is a deadline unless the response is a stream, whose heartbeats keep the client waiting.
    """
    requested = None if body.deadline_ms is None else body.deadline_ms / 1000
    read_timeout = None if body.stream else client.read_timeout
    return min((limit for limit in (requested, read_timeout) if limit is not None), default=None)


def _fingerprint(route: str, body: RequestBody, sub_requests: Sequence[SubRequest]) -> str:
    """A digest of what was read rather than of the bytes: a form's boundary differs in every request."""
    digest = hashlib.sha256(f"{route}\n{body.model_dump_json(exclude=_FILES)}".encode())
    for sub_request in sub_requests:
        generation = sub_request.generation
        arrays = [generation.image, generation.mask, generation.references, generation.reference_sizes]
        if (compositing := sub_request.compositing) is not None:  # in a size that the model does not see
            digest.update(repr(compositing.size).encode())
            arrays += [compositing.kept, compositing.mask]
        for pixels in arrays:
            if pixels is not None:
                digest.update(repr(pixels.shape).encode())
                digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
