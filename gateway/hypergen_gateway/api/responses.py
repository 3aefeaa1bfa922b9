"""Pictures to OpenAI's answers: the objects of its Images and Models APIs, and what they say about cost.

Knows the shapes and the words of OpenAI's schema. Knows neither HTTP nor Triton.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from hypergen_gateway.api.fields import ImageRequest, PictureRequest
from hypergen_gateway.api.validation import Quality, quality_of
from hypergen_gateway.generation.backend import Pixels
from hypergen_gateway.generation.images import FormatName
from hypergen_gateway.generation.service import EncodedImage
from hypergen_gateway.generation.sizes import Size

# What one position of a Stable Diffusion's latents stands for: 8 × 8 pixels.
_PIXELS_PER_TOKEN = 64


class ModelObject(BaseModel):
    """A model, as /v1/models lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: Literal["hypergen"] = "hypergen"


class ModelList(BaseModel):
    """The models that are served: exactly one."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """How the server is. What only Triton knows is null until it has told."""

    status: Literal["healthy", "unhealthy"]
    model: str | None
    queue_size: int
    device: str | None


class ImageObject(BaseModel):
    """One picture of a response. `seed` is an extension: with it, and n = 1, the picture can be made again."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class InputTokensDetails(BaseModel):
    """What the input tokens stand for."""

    text_tokens: int = Field(description="Tokens of the prompt and the negative prompt, as the text encoder read them.")
    image_tokens: int = Field(description="Squares of 8 × 8 pixels in the images that pictures started from.")


class Usage(BaseModel):
    """What the pictures cost. A token of an image is a square of 8 × 8 pixels, in the size that the model draws."""

    input_tokens: int
    output_tokens: int = Field(description="Squares of 8 × 8 pixels in the pictures that were drawn.")
    total_tokens: int
    input_tokens_details: InputTokensDetails


_TRUNCATED = Field(
    default=None,
    description="Tokens of the prompt and the negative prompt that the text encoder did not read, if there are any.",
)


class ImagesResponse(BaseModel):
    """The response to a request for pictures."""

    created: int = Field(default_factory=lambda: int(time.time()))
    background: Literal["opaque"] = "opaque"
    output_format: FormatName
    quality: Quality
    size: str | None = Field(default=None, description="WIDTHxHEIGHT, unless the pictures differ in it.")
    data: list[ImageObject]
    usage: Usage
    prompt_truncated: int | None = _TRUNCATED


def images_response(
    request: PictureRequest, finished: Sequence[EncodedImage], urls: Sequence[str] | None = None
) -> ImagesResponse:
    """The response that holds pictures: as base64, or as links where there are any."""
    contents = (
        [{"b64_json": base64.b64encode(picture.file).decode("ascii")} for picture in finished]
        if urls is None
        else [{"url": url} for url in urls]
    )
    return ImagesResponse(
        output_format=request.output_format,
        quality=quality_of(request),
        size=_size(finished),
        data=[
            ImageObject(**content, revised_prompt=request.prompt or None, seed=picture.picture.seed)
            for content, picture in zip(contents, finished, strict=True)
        ],
        usage=usage(finished),
        prompt_truncated=truncated(finished[0]),
    )


class _ImageEvent(BaseModel):
    """A picture in a stream. `image_index` is an extension: which of the n pictures it is."""

    b64_json: str
    created_at: int = Field(default_factory=lambda: int(time.time()))
    size: str = Field(description="WIDTHxHEIGHT of the picture.")
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: FormatName
    image_index: int


class PartialImageEvent(_ImageEvent):
    """A preview: what the model expects the picture to become."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """A finished picture. `seed` is an extension; `usage` is that of this picture, as if asked for alone."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage
    seed: int
    prompt_truncated: int | None = _TRUNCATED


def image_event(request: PictureRequest, finished: EncodedImage, number: int) -> PartialImageEvent | CompletedEvent:
    """The event that carries a preview, the `number`-th of its picture, or a finished picture."""
    picture = finished.picture
    is_generation = isinstance(request, ImageRequest)
    common: dict[str, Any] = {
        "b64_json": base64.b64encode(finished.file).decode("ascii"),
        "size": _written(finished.size),
        "quality": quality_of(request),
        "output_format": request.output_format,
        "image_index": picture.index,
    }
    if not picture.is_final:
        return PartialImageEvent(
            type="image_generation.partial_image" if is_generation else "image_edit.partial_image",
            partial_image_index=number,
            **common,
        )
    return CompletedEvent(
        type="image_generation.completed" if is_generation else "image_edit.completed",
        usage=usage([finished]),
        seed=picture.seed,
        prompt_truncated=truncated(finished),
        **common,
    )


def usage(finished: Sequence[EncodedImage]) -> Usage:
    """The tokens that went into pictures of a request and came out."""
    text_tokens = finished[0].picture.prompt_tokens
    # Pictures that started from the same image share it.
    images = {
        id(image): image for image in (picture.part.generation.image for picture in finished) if image is not None
    }
    image_tokens = sum(_tokens(image) for image in images.values())
    output_tokens = sum(_tokens(picture.picture.pixels) for picture in finished)
    return Usage(
        input_tokens=text_tokens + image_tokens,
        output_tokens=output_tokens,
        total_tokens=text_tokens + image_tokens + output_tokens,
        input_tokens_details=InputTokensDetails(text_tokens=text_tokens, image_tokens=image_tokens),
    )


def truncated(finished: EncodedImage) -> int | None:
    """How many tokens of a request's texts were cut off; None if all were read."""
    return finished.picture.truncated_tokens or None


def server_timing(finished: Sequence[EncodedImage]) -> str:
    """Where the time went, as the header `Server-Timing` says it: of each phase, what the slowest picture took."""
    phases = {
        "queue": [picture.picture.timings.queue for picture in finished],
        "encode-text": [picture.picture.timings.encode_text for picture in finished],
        "denoise": [picture.picture.timings.denoise for picture in finished],
        "decode": [picture.picture.timings.decode for picture in finished],
        "encode-image": [picture.encode_image for picture in finished],
    }
    return ", ".join(f"{name};dur={max(durations):.1f}" for name, durations in phases.items())


def _tokens(pixels: Pixels) -> int:
    return pixels.shape[0] * pixels.shape[1] // _PIXELS_PER_TOKEN


def _size(finished: Sequence[EncodedImage]) -> str | None:
    """The size of all pictures, if they share one; those that start from several images have each its own."""
    sizes = {picture.size for picture in finished}
    return _written(sizes.pop()) if len(sizes) == 1 else None


def _written(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
