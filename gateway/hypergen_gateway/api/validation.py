"""What comes over the wire becomes a `GenerationRequest`.

Knows which values are legal and the words for saying so. Types and the API's own ranges stand in `fields`; sizes,
defaults and schedulers come from the `ModelDescription`. Knows neither HTTP nor Triton.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Container
from typing import Any, BinaryIO, Literal, TypeVar

from pydantic import ValidationError

from hypergen_gateway.api.bodies import shown
from hypergen_gateway.api.data_urls import file_in
from hypergen_gateway.api.fields import (
    MAX_DEADLINE_MS,
    MAX_IMAGES,
    EditForm,
    EditRequest,
    ImageRequest,
    PictureFields,
    PictureRequest,
    VariationForm,
)
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import MAX_SEED, GenerationRequest, ModelDescription
from hypergen_gateway.generation.image_inputs import Uploads
from hypergen_gateway.generation.images import FileFormat
from hypergen_gateway.generation.sizes import Size, SizePolicy, nearest_size

# Seeds drawn here stay below 2^53: larger ones lose digits in JavaScript, and then a picture cannot be made again.
_RANDOM_SEEDS = 2**53

# Enough for another picture, little enough for one of the same thing.
_VARIATION_STRENGTH = 0.6

Request = TypeVar("Request", ImageRequest, EditRequest, EditForm, VariationForm)
Quality = Literal["low", "medium", "high"]
# The words of all of OpenAI's models in those that tell three kinds of work apart.
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

_ANY_SIZE = SizePolicy()

# Values that the API has and this server does not: for these fields, only what stands here is served.
_SERVED: dict[str, tuple[object, ...]] = {
    "background": ("auto", "opaque"),
}

# Models of OpenAI that answer with links unless asked otherwise.
_LINKING_MODELS = ("dall-e-2", "dall-e-3")

_EDITS = "images to start from are for POST /v1/images/edits"
_ANIMATED = "'output_format' can be neither gif nor svg here"
_ANY_ROUTE = dict.fromkeys(("frame_count", "frame_duration_ms", "svg"), _ANIMATED)
_MARKUP = {"markup": "this server takes no markup; a 'mask' says what is drawn anew"}
# Fields that a route does not have and whose sender would expect another picture: refused rather than ignored, with
# the reason.
_ELSEWHERE: dict[type[PictureFields], dict[str, str]] = {
    ImageRequest: _ANY_ROUTE | dict.fromkeys(("image", "images", "mask", "strength", "markup"), _EDITS),
    EditRequest: _ANY_ROUTE | _MARKUP,
    EditForm: _ANY_ROUTE | _MARKUP,
    VariationForm: _ANY_ROUTE
    | dict.fromkeys(("prompt", "mask", "markup"), "what is to change is said in POST /v1/images/edits"),
}
# Which of the words below say what the images of a request may be, whichever of its two names it uses.
_LEGAL_IMAGES = {ImageRequest: "image", EditRequest: "images", EditForm: "image", VariationForm: "image"}

# What a field may hold, to complete "It must be …". Braces are filled from the model's description.
_LEGAL: dict[str, str] = {
    "prompt": "a string of 1 to 32,000 characters",
    "model": "a string",
    "n": "an integer from 1 to {max_num_images}",
    "size": "'auto' or {legal_sizes}",
    "quality": "'low', 'medium', 'high', 'xhigh', 'max', 'auto', 'standard' or 'hd'",
    "response_format": "'b64_json' or 'url'",
    "output_format": "'png', 'jpeg' or 'webp'",
    "output_compression": "an integer from 0 to 100",
    "background": "'auto' or 'opaque'",
    "stream": "true or false",
    "partial_images": "an integer from 0 to 3",
    "moderation": "'low' or 'auto'",
    "style": "'vivid' or 'natural'",
    "user": "a string",
    "safety_identifier": "a string",
    "negative_prompt": "a string of at most 32,000 characters",
    "num_inference_steps": "an integer from 1 to {max_num_inference_steps}",
    "guidance_scale": "a number from 1 to {max_guidance_scale:g}",
    "guidance_start": "a number from 0 to 1",
    "guidance_end": "a number from 'guidance_start' to 1",
    "cache_interval": "{legal_cache_intervals}",
    "scheduler": "one of {known_schedulers}",
    "seed": f"an integer from 0 to {MAX_SEED}, and so must be seed + n - 1; -1 is a random one",
    "strength": "a number from 0 to 1",
    "input_fidelity": "'high' or 'low'",
    "image": "a PNG, JPEG, WebP, AVIF or GIF file; an edit takes up to {max_images}",
    "images": (
        '1 to {max_images} images, each an object such as {{"image_url": "data:image/png;base64,…"}}; '
        "a file_id would need OpenAI's Files API"
    ),
    "mask": 'a PNG, transparent where the image is drawn anew; in JSON {{"image_url": "data:image/png;base64,…"}}',
    "deadline_ms": f"an integer from 1 to {MAX_DEADLINE_MS}",
    "lora_path": "{known_loras}",
    "lora_scale": "a number from 0 to 2",
}


def read_request(
    payload: dict[str, Any], kind: type[Request], model: ModelDescription, sizes: SizePolicy = _ANY_SIZE
) -> Request:
    """Validates a body's fields; the first wrong one is named in the error."""
    given = {name: value for name, value in payload.items() if value is not None}
    _refuse_what_belongs_elsewhere(given, kind)
    try:
        request: Request = kind.model_validate(given)
    except ValidationError as error:
        raise _invalid(str(error.errors()[0]["loc"][0]), given, model, sizes, _LEGAL_IMAGES[kind]) from error
    for name, served in _SERVED.items():
        if getattr(request, name) not in served:
            raise InvalidRequestError(
                f"{shown(given[name])} for '{name}' is not supported by this server. It must be {_LEGAL[name]}.", name
            )
    _check_combinations(request)
    return request


def _refuse_what_belongs_elsewhere(given: dict[str, Any], kind: type[PictureFields]) -> None:
    for name, reason in _ELSEWHERE[kind].items():
        if name in given:
            raise InvalidRequestError(f"'{name}' is not a field of this request: {reason}.", name)
    if all(name in given for name in ("image", "images")):
        raise InvalidRequestError("'image' and 'images' are two names of one field. Send one of them.", "images")


def _check_combinations(request: PictureRequest) -> None:
    if request.output_format == "png" and request.output_compression != 100:
        raise InvalidRequestError(
            "'output_compression' is for 'jpeg' and 'webp': 'png' loses nothing. It must be 100 or left out.",
            "output_compression",
        )
    if request.stream and isinstance(request, VariationForm):
        raise InvalidRequestError(
            "Invalid value for 'stream': variations come all at once; POST /v1/images/edits streams.", "stream"
        )
    if request.stream and request.response_format == "url":
        raise InvalidRequestError(
            "Invalid value for 'response_format': a stream carries its pictures. It must be 'b64_json'.",
            "response_format",
        )


def wants_links(request: PictureRequest, *, by_habit: bool) -> bool:
    """Whether pictures are sent as links rather than in the answer.

    Unsaid, it is as with OpenAI's model that is named; without a name as `by_habit` tells of the client.
    """
    if request.response_format is not None or request.stream:
        return request.response_format == "url"
    # OpenAI has variations by one model alone.
    model = request.model or ("dall-e-2" if isinstance(request, VariationForm) else None)
    return model in _LINKING_MODELS or (by_habit and not model)


def file_format_of(request: PictureRequest) -> FileFormat:
    """The files that a request asks for."""
    return FileFormat(request.output_format, request.output_compression)


def strength_of(request: PictureRequest, model: ModelDescription) -> float | None:
    """How much of the image is given up; None leaves it to the model."""
    if isinstance(request, ImageRequest):
        return None
    if isinstance(request, VariationForm) and request.strength is None:
        return max(_VARIATION_STRENGTH, 1 / steps_of(request, model))
    return request.strength


def steps_of(request: PictureRequest, model: ModelDescription) -> int:
    """Those that are asked for, or as many as the quality says."""
    if request.num_inference_steps is not None:
        return request.num_inference_steps
    steps = round(model.default_num_inference_steps * _STEPS_BY_QUALITY[_QUALITIES[request.quality]])
    return min(max(steps, 1), model.max_num_inference_steps)


def images_param(payload: Container[str]) -> str:
    """The name by which a client knows the images that it sent."""
    return "images" if "images" in payload else "image"


def may_stay(request: PictureRequest, model: ModelDescription) -> bool:
    """Whether the strength may leave no step, so that an image comes back as it is."""
    strength = strength_of(request, model)
    return strength is not None and strength * steps_of(request, model) < 1


def uploads_of_form(request: EditForm | VariationForm, param: str) -> Uploads:
    """The files that came with a form, as `param`."""
    if isinstance(request, VariationForm):
        return Uploads(images=[request.image.file], mask=None, images_param=param)
    mask = None if request.mask is None else request.mask.file
    return Uploads(images=[image.file for image in request.image], mask=mask, images_param=param)


def uploads_of_json(request: EditRequest, param: str) -> Uploads:
    """The files that stand in a JSON body, as `param`."""
    mask = None if request.mask is None else _file_in(request.mask, "mask")
    return Uploads(images=[_file_in(image, param) for image in request.images], mask=mask, images_param=param)


def _file_in(reference: str, param: str) -> BinaryIO:
    try:
        return io.BytesIO(file_in(reference))
    except ValueError as error:
        raise InvalidRequestError(f"An image in '{param}' {error}.", param) from error


def quality_of(request: PictureRequest) -> Quality:
    """The quality that a request gets, in a word of OpenAI's schema for responses."""
    return _QUALITIES[request.quality]


def to_generation(request: PictureRequest, model: ModelDescription) -> GenerationRequest:
    """A request with the model's defaults filled in, within the model's limits.

    Its size is the one that the model draws for what is asked; `auto` is the model's own. An image to start from says
    otherwise.
    """
    asked = asked_size(request)
    width, height = (model.default_width, model.default_height) if asked is None else nearest_size(asked, model)
    seed = secrets.randbelow(_RANDOM_SEEDS - request.n) if request.seed in (None, -1) else request.seed
    guidance = request.guidance_scale
    generation = GenerationRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_images=request.n,
        width=width,
        height=height,
        num_inference_steps=steps_of(request, model),
        guidance_scale=model.default_guidance_scale if guidance is None else guidance,
        guidance_start=request.guidance_start,
        guidance_end=request.guidance_end,
        cache_interval=request.cache_interval,
        scheduler=request.scheduler,
        seed=seed,
        partial_images=request.partial_images if request.stream else 0,
        **_lora(request, model),
    )
    _check_limits(generation, request, model)
    return generation


def _check_limits(generation: GenerationRequest, request: PictureRequest, model: ModelDescription) -> None:
    legal = {
        "n": generation.num_images <= model.max_num_images,
        "num_inference_steps": generation.num_inference_steps <= model.max_num_inference_steps,
        "guidance_scale": generation.guidance_scale <= model.max_guidance_scale,
        "guidance_end": request.guidance_end is None or (request.guidance_start or 0.0) <= request.guidance_end,
        "cache_interval": (generation.cache_interval or 1) <= model.max_cache_interval,
        "scheduler": generation.scheduler is None or generation.scheduler in model.schedulers,
        "seed": generation.seed + generation.num_images - 1 <= MAX_SEED,
    }
    for name, fine in legal.items():
        if not fine:
            raise _invalid(name, {name: getattr(request, name)}, model)


def _lora(request: PictureRequest, model: ModelDescription) -> dict[str, Any]:
    """The LoRA and its scale, both absent for the model as it is: also at scale 0, and where a scale stands alone."""
    if request.lora_path is None:
        return {}
    scales = [lora.scale for lora in model.loras if lora.name == request.lora_path]
    if not scales:
        raise _invalid("lora_path", {"lora_path": request.lora_path}, model)
    scale = scales[0] if request.lora_scale is None else request.lora_scale
    if scale not in (0, *scales):
        known = ", ".join(f"{one:g}" for one in scales)
        raise InvalidRequestError(
            f"Invalid value for 'lora_scale': {scale:g}. '{request.lora_path}' is served at {known}; 0 leaves it out.",
            "lora_scale",
        )
    return {"lora": request.lora_path, "lora_scale": scale} if scale else {}


def asked_size(request: PictureRequest) -> Size | None:
    """Width and height that a request asks for; None where it leaves them to us."""
    if request.size == "auto":
        return None
    width, height = request.size.split("x")
    return int(width), int(height)


def _legal_cache_intervals(model: ModelDescription) -> str:
    if model.max_cache_interval == 1:
        return "1 or absent, as the model is served without --deep-cache"
    return f"an integer from 1 to {model.max_cache_interval}"


def _known_loras(model: ModelDescription) -> str:
    names = dict.fromkeys(repr(lora.name) for lora in model.loras)
    return f"one of {', '.join(names)}" if names else "absent, as the model is served without any LoRA"


def _invalid(
    name: str, given: dict[str, Any], model: ModelDescription, sizes: SizePolicy = _ANY_SIZE, images: str = "image"
) -> InvalidRequestError:
    more = {
        "known_schedulers": ", ".join(model.schedulers),
        "legal_sizes": sizes.legal(model),
        "known_loras": _known_loras(model),
        "legal_cache_intervals": _legal_cache_intervals(model),
        "max_images": MAX_IMAGES,
    }
    legal = _LEGAL[images if name in ("image", "images") else name].format(**vars(model), **more)
    problem = f"Invalid value for '{name}': {shown(given[name])}." if name in given else f"'{name}' is missing."
    return InvalidRequestError(f"{problem} It must be {legal}.", name)
