"""Validation of request bodies: which values are legal, and the error messages that say so.

Types and the API's own ranges are in `fields`; sizes, defaults and schedulers come from the `ModelDescription`. Does
not depend on HTTP or Triton.
"""

from __future__ import annotations

import io
from collections.abc import Container
from typing import Any, BinaryIO, TypeVar

from pydantic import ValidationError

from hypergen_gateway.api.bodies import shown
from hypergen_gateway.api.data_urls import file_in
from hypergen_gateway.api.fields import (
    MAX_IMAGES,
    EditForm,
    EditRequest,
    ImageFields,
    ImageRequest,
    ModelLimit,
    RequestBody,
    VariationForm,
    legal_values,
    model_limit,
)
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import (
    MAX_SEED,
    SKIP_LAYER_GUIDANCE_START,
    SKIP_LAYER_GUIDANCE_STOP,
    GenerationRequest,
    ModelDescription,
)
from hypergen_gateway.generation.image_inputs import Uploads
from hypergen_gateway.generation.sizes import Size, SizePolicy

Body = TypeVar("Body", ImageRequest, EditRequest, EditForm, VariationForm)
_ANY_SIZE = SizePolicy()

# Fields of which this server supports only the values listed here, though the API has more.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "background": ("auto", "opaque"),
}

_EDITS = "use POST /v1/images/edits for input images"
_ANIMATED = "'output_format' cannot be gif or svg on this server"
# The names that other image servers give to fields of every request.
_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "width": "size",
    "height": "size",
    "sampler_name": "scheduler",
    "num_images": "n",
}
_ANY_ROUTE = {
    **dict.fromkeys(("frame_count", "frame_duration_ms", "svg"), _ANIMATED),
    **{name: f"this server calls it '{ours}'" for name, ours in _OTHER_NAMES.items()},
}
_MARKUP = {"markup": "this server does not support markup; use a 'mask' to select what is regenerated"}
_BRACKETS = {"image[]": "in JSON it is 'images'"}
# Fields that a route does not have, but that a client would send to get a different image: rejected with the reason
# rather than ignored.
_ELSEWHERE: dict[type[ImageFields], dict[str, str]] = {
    ImageRequest: _ANY_ROUTE | dict.fromkeys(("image", "images", "image[]", "mask", "strength", "markup"), _EDITS),
    EditRequest: _ANY_ROUTE | _MARKUP | _BRACKETS,
    EditForm: _ANY_ROUTE | _MARKUP,
    VariationForm: _ANY_ROUTE
    | dict.fromkeys(("prompt", "mask", "markup"), "use POST /v1/images/edits to describe a change"),
}


def validate(payload: dict[str, Any], kind: type[Body], model: ModelDescription, sizes: SizePolicy = _ANY_SIZE) -> Body:
    """The validated fields of a request body.

    Raises:
        InvalidRequestError: a field is invalid; `param` is the first such field.
    """
    given = {name: value for name, value in payload.items() if value is not None}
    _reject_fields_of_other_routes(given, kind)
    try:
        body: Body = kind.model_validate(given)
    except ValidationError as error:
        raise invalid(str(error.errors()[0]["loc"][0]), given, model, kind, sizes) from error
    for name, supported in _SUPPORTED.items():
        if getattr(body, name) not in supported:
            problem = f"{shown(given[name])} for '{name}' is not supported by this server."
            raise InvalidRequestError(f"{problem} It must be {legal_values(kind, name)}.", name)
    _check_combinations(body)
    if isinstance(body, ImageRequest) and (size := requested_size(body)) is not None:
        sizes.check(size, model)
    return body


def _reject_fields_of_other_routes(given: dict[str, Any], kind: type[ImageFields]) -> None:
    for name, reason in _ELSEWHERE[kind].items():
        if name in given:
            raise InvalidRequestError(f"'{name}' is not a field of this request: {reason}.", name)
    if all(name in given for name in ("image", "images")):
        raise InvalidRequestError("'image' and 'images' are two names of one field. Send one of them.", "images")


def _check_combinations(body: RequestBody) -> None:
    if body.output_format == "png" and body.output_compression != 100:
        raise InvalidRequestError(
            "'output_compression' is for 'jpeg' and 'webp': 'png' is lossless. It must be 100 or omitted.",
            "output_compression",
        )
    if body.stream and isinstance(body, VariationForm):
        raise InvalidRequestError(
            "Invalid value for 'stream': variations cannot be streamed; POST /v1/images/edits can.", "stream"
        )
    if body.stream and body.response_format == "url":
        raise InvalidRequestError(
            "Invalid value for 'response_format': the images of a stream cannot be links. It must be 'b64_json'.",
            "response_format",
        )


def requested_size(body: RequestBody) -> Size | None:
    """Width and height; None for `auto`."""
    if body.size == "auto":
        return None
    width, height = body.size.split("x")
    return int(width), int(height)


def check_limits(generation: GenerationRequest, body: RequestBody, model: ModelDescription) -> None:
    """Checks a request against the limits of the model.

    Raises:
        InvalidRequestError: a value is not legal for this model; `param` is the field.
    """
    if isinstance(body, ImageRequest) and model.edits_by_instruction:
        raise InvalidRequestError("The model edits images: send one to POST /v1/images/edits.", None)
    limits = {name: limit for name in type(body).model_fields if (limit := model_limit(type(body), name))}
    is_legal = {
        **{name: _is_within(getattr(body, name), limit, model) for name, limit in limits.items()},
        "negative_prompt": not body.negative_prompt or model.has_negative_prompt,
        "guidance_end": body.guidance_end is None or (body.guidance_start or 0.0) <= body.guidance_end,
        "skip_layer_guidance_start": _is_legal_skip_start(body, model),
        "skip_layer_guidance_stop": _is_legal_skip_stop(body, model),
        "strength": isinstance(body, ImageRequest) or body.strength is None or not model.edits_by_instruction,
        "prompt_weighting": body.prompt_weighting is None or body.prompt_weighting in model.prompt_weightings,
        "scheduler": generation.scheduler is None or generation.scheduler in model.schedulers,
        "seed": generation.seed + generation.num_images - 1 <= MAX_SEED,
    }
    for name, legal in is_legal.items():
        if not legal:
            raise invalid(name, {name: getattr(body, name)}, model, type(body))


def _is_within(value: float | None, limit: ModelLimit, model: ModelDescription) -> bool:
    if value is None:
        return True
    lower = getattr(model, limit.lower) if limit.lower else value
    return bool(lower <= value <= getattr(model, limit.name))


def _is_legal_skip_start(body: RequestBody, model: ModelDescription) -> bool:
    """Whether it is not after the default stop; one that is given is to blame itself."""
    start = body.skip_layer_guidance_start or 0.0
    if not model.max_skip_layer_guidance_scale:
        return not start
    return body.skip_layer_guidance_stop is not None or start <= SKIP_LAYER_GUIDANCE_STOP


def _is_legal_skip_stop(body: RequestBody, model: ModelDescription) -> bool:
    start, stop = body.skip_layer_guidance_start, body.skip_layer_guidance_stop
    if not model.max_skip_layer_guidance_scale:
        return not stop
    return stop is None or (SKIP_LAYER_GUIDANCE_START if start is None else start) <= stop


def images_param(payload: Container[str]) -> str:
    """The name that the client used for the field of its images."""
    return "images" if "images" in payload else "image"


def uploads_of_form(body: EditForm | VariationForm, param: str) -> Uploads:
    """The files of a form; `param` is the name of their field."""
    if isinstance(body, VariationForm):
        return Uploads(images=[body.image.file], mask=None, images_param=param)
    mask = None if body.mask is None else body.mask.file
    return Uploads(images=[image.file for image in body.image], mask=mask, images_param=param)


def uploads_of_json(body: EditRequest, param: str) -> Uploads:
    """The files in a JSON body; `param` is the name of their field."""
    mask = None if body.mask is None else _file_in(body.mask, "mask")
    return Uploads(images=[_file_in(image, param) for image in body.images], mask=mask, images_param=param)


def _file_in(reference: str, param: str) -> BinaryIO:
    try:
        return io.BytesIO(file_in(reference))
    except ValueError as error:
        raise InvalidRequestError(f"An image in '{param}' {error}.", param) from error


def _legal_cache_intervals(model: ModelDescription) -> str:
    if model.max_cache_interval == 1:
        return "1 or absent, as the model is served without --deep-cache"
    return f"an integer from 1 to {model.max_cache_interval}"


def _legal_clip_skips(model: ModelDescription) -> str:
    if not model.max_clip_skip:
        return "absent or 0, as the model's text encoders do not skip layers"
    return f"an integer from 0 to {model.max_clip_skip}"


def _legal_prompt_weightings(model: ModelDescription) -> str:
    if len(model.prompt_weightings) == 1:
        return f"absent or {model.prompt_weightings[0]!r}, as the model's prompts have no weights"
    return f"one of {', '.join(map(repr, model.prompt_weightings))}"


def _legal_guidance_scales(model: ModelDescription) -> str:
    low, high = model.min_guidance_scale, model.max_guidance_scale
    if low == high:
        return f"absent or {low:g}, as the model takes no guidance"
    return f"a number from {low:g} to {high:g}"


def _legal_skip_layer_guidance(model: ModelDescription) -> dict[str, str]:
    names = [f"legal_skip_layer_guidance_{name}" for name in ("scales", "starts", "stops")]
    if not model.max_skip_layer_guidance_scale:
        return dict.fromkeys(names, "absent or 0, as the model has no skip-layer guidance")
    scales = f"a number from 0 to {model.max_skip_layer_guidance_scale:g}"
    starts = f"a number from 0 to 'skip_layer_guidance_stop', {SKIP_LAYER_GUIDANCE_STOP:g} by default"
    stops = f"a number from 'skip_layer_guidance_start', {SKIP_LAYER_GUIDANCE_START:g} by default, to 1"
    legal = (scales, starts, stops)
    return dict(zip(names, legal, strict=True))


def _legal_image_guidance_scales(model: ModelDescription) -> str:
    if not model.edits_by_instruction:
        return "absent, as the model does not edit by instruction"
    return f"a number from 1 to {model.max_image_guidance_scale:g}"


def _legal_strengths(model: ModelDescription) -> str:
    return "absent, as the model edits by instruction" if model.edits_by_instruction else "a number from 0 to 1"


def _known_loras(model: ModelDescription) -> str:
    return f"one of {_offered_loras(model)}" if model.loras else "absent, as the model is served without any LoRA"


def _offered_loras(model: ModelDescription) -> str:
    names = dict.fromkeys(repr(lora.name) for lora in model.loras)
    return ", ".join(names) or "LoRAs, of which the model is served with none"


def invalid(
    name: str,
    given: dict[str, Any],
    model: ModelDescription,
    kind: type[ImageFields],
    sizes: SizePolicy = _ANY_SIZE,
) -> InvalidRequestError:
    """The error for a field of a `kind` of body that is missing from `given` or has an illegal value there."""
    more = {
        "known_schedulers": ", ".join(model.schedulers),
        "legal_sizes": sizes.legal(model),
        "known_loras": _known_loras(model),
        "offered_loras": _offered_loras(model),
        "legal_cache_intervals": _legal_cache_intervals(model),
        "legal_clip_skips": _legal_clip_skips(model),
        **_legal_skip_layer_guidance(model),
        "legal_prompt_weightings": _legal_prompt_weightings(model),
        "legal_image_guidance_scales": _legal_image_guidance_scales(model),
        "legal_strengths": _legal_strengths(model),
        "legal_guidance_scales": _legal_guidance_scales(model),
        "legal_negative_prompts": (
            "a string of at most 32,000 characters"
            if model.has_negative_prompt
            else "absent or empty, as the model has no negative prompts"
        ),
        "max_images": MAX_IMAGES,
    }
    # 'image' and 'images' are two names for one field.
    field = name if name in kind.model_fields else {"image": "images", "images": "image"}[name]
    legal = legal_values(kind, field).format(**vars(model), **more)
    problem = f"Invalid value for '{name}': {shown(given[name])}." if name in given else f"'{name}' is missing."
    return InvalidRequestError(f"{problem} It must be {legal}.", name)
