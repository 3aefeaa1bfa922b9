"""Response bodies and events in the shapes of OpenAI's Images and Models APIs."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from hypergen_gateway.generation.backend import GenerationRequest, Lora, Pixels
from hypergen_gateway.generation.images import FormatName
from hypergen_gateway.generation.request import ClientRequest, Quality
from hypergen_gateway.generation.service import EncodedImage
from hypergen_gateway.generation.sizes import Size

# One position of Stable Diffusion's latents covers 8 × 8 pixels.
_PIXELS_PER_TOKEN = 64


class ModelObject(BaseModel):
    """A model, as /v1/models lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: Literal["hypergen"] = "hypergen"


class LoraObject(BaseModel):
    """A LoRA that the server has."""

    object: Literal["lora"] = "lora"
    name: str
    default_scale: float | None = Field(default=None, description="None if it cannot be served.")
    rank: int | None = Field(default=None, description="Columns of the rank pool; none if it is merged.")
    in_pool: bool | None = Field(
        default=None, description="False: the next request that names it waits until it is there. None if it is merged."
    )
    changes: tuple[str, ...] = Field(default=(), description="The parts of the model that it changes.")
    error: str | None = Field(default=None, description="Why it cannot be served.")


class DeletedLora(BaseModel):
    """A LoRA file that has been removed."""

    object: Literal["lora"] = "lora"
    name: str
    deleted: Literal[True] = True


class LoraList(BaseModel):
    """The response of GET /v1/loras; an extension."""

    object: Literal["list"] = "list"
    data: list[LoraObject]


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
    """One image of a response. `seed` is an extension: with it, and n = 1, the image can be generated again."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class InputTokensDetails(BaseModel):
    """The input tokens by kind."""

    text_tokens: int = Field(description="Tokens of the prompt and the negative prompt, as the text encoder read them.")
    image_tokens: int = Field(description="Squares of 8 × 8 pixels in the input images.")


class Usage(BaseModel):
    """The tokens of a request. An image's tokens are squares of 8 × 8 pixels, in the size that the model generates."""

    input_tokens: int
    output_tokens: int = Field(description="Squares of 8 × 8 pixels in the generated images.")
    total_tokens: int
    input_tokens_details: InputTokensDetails


_TRUNCATED = Field(
    default=None,
    description="The tokens of the prompt and the negative prompt that were cut off, if any.",
)


class ImagesResponse(BaseModel):
    """The response to a request for images."""

    created: int = Field(default_factory=lambda: int(time.time()))
    background: Literal["opaque"] = "opaque"
    output_format: FormatName
    quality: Quality
    size: str | None = Field(default=None, description="WIDTHxHEIGHT, if all images have the same size.")
    data: list[ImageObject]
    usage: Usage
    prompt_truncated: int | None = _TRUNCATED


def images_response(
    request: ClientRequest, images: Sequence[EncodedImage], urls: Sequence[str] | None = None
) -> ImagesResponse:
    """The response to a request: the images in base64, or the links in `urls`."""
    contents = (
        [{"b64_json": base64.b64encode(image.file).decode("ascii")} for image in images]
        if urls is None
        else [{"url": url} for url in urls]
    )
    return ImagesResponse(
        output_format=request.file_format.name,
        quality=request.quality,
        size=_common_size(images),
        data=[
            ImageObject(**content, revised_prompt=request.prompt or None, seed=encoded.image.seed)
            for content, encoded in zip(contents, images, strict=True)
        ],
        usage=usage(images),
        prompt_truncated=truncated(images[0]),
    )


class _ImageEvent(BaseModel):
    """An image in a stream. `image_index` is an extension: which of the n images it is."""

    b64_json: str
    created_at: int = Field(default_factory=lambda: int(time.time()))
    size: str = Field(description="WIDTHxHEIGHT of the image.")
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: FormatName
    image_index: int


class PartialImageEvent(_ImageEvent):
    """A preview: what the model expects the image to become."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """A finished image. `seed` is an extension; `usage` is that of this image, as if requested alone."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage
    seed: int
    prompt_truncated: int | None = _TRUNCATED


def image_event(request: ClientRequest, encoded: EncodedImage, number: int) -> PartialImageEvent | CompletedEvent:
    """The event for an image, or for a preview, the `number`-th of its image."""
    common: dict[str, Any] = {
        "type": f"{request.operation}.{'completed' if encoded.image.is_final else 'partial_image'}",
        "b64_json": base64.b64encode(encoded.file).decode("ascii"),
        "size": _to_text(encoded.size),
        "quality": request.quality,
        "output_format": request.file_format.name,
        "image_index": encoded.image.index,
    }
    if not encoded.image.is_final:
        return PartialImageEvent(partial_image_index=number, **common)
    return CompletedEvent(
        usage=usage([encoded]),
        seed=encoded.image.seed,
        prompt_truncated=truncated(encoded),
        **common,
    )


def usage(images: Sequence[EncodedImage]) -> Usage:
    """The input and output tokens of images of one request."""
    text_tokens = images[0].image.prompt_tokens
    inputs = [encoded.sub_request.generation for encoded in images]
    # Images that start from the same init image share it.
    image_tokens = sum(_input_tokens(generation) for generation in {id(each.image): each for each in inputs}.values())
    output_tokens = sum(_tokens(encoded.image.pixels) for encoded in images)
    return Usage(
        input_tokens=text_tokens + image_tokens,
        output_tokens=output_tokens,
        total_tokens=text_tokens + image_tokens + output_tokens,
        input_tokens_details=InputTokensDetails(text_tokens=text_tokens, image_tokens=image_tokens),
    )


def truncated(encoded: EncodedImage) -> int | None:
    """The number of tokens that were cut off the prompts; None if there are none."""
    return encoded.image.truncated_tokens or None


def server_timing(images: Sequence[EncodedImage]) -> str:
    """The `Server-Timing` header: the slowest image's time in each phase."""
    timings = [encoded.image.timings for encoded in images]
    phases = {
        "queue": [each.queue for each in timings],
        "encode-text": [each.encode_text for each in timings],
        "denoise": [each.denoise for each in timings],
        "decode": [each.decode for each in timings],
        "encode-image": [encoded.encode_ms for encoded in images],
    }
    return ", ".join(f"{name};dur={max(durations):.1f}" for name, durations in phases.items())


def _input_tokens(generation: GenerationRequest) -> int:
    references = sum(pixels // _PIXELS_PER_TOKEN for pixels in generation.reference_pixels)
    return references + (0 if generation.image is None else _tokens(generation.image))


def _tokens(pixels: Pixels) -> int:
    return pixels.shape[0] * pixels.shape[1] // _PIXELS_PER_TOKEN


def _common_size(images: Sequence[EncodedImage]) -> str | None:
    """The size of all images; None if they differ, as they may when they start from several init images."""
    sizes = {encoded.size for encoded in images}
    return _to_text(sizes.pop()) if len(sizes) == 1 else None


def _to_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def lora_list(loras: Sequence[Lora], rejected: Mapping[str, str]) -> LoraList:
    """The LoRAs of a model, and those that it cannot serve, with the reason."""
    by_name = {lora.name: lora for lora in reversed(loras)}
    served = [_lora(lora) for lora in by_name.values()]
    return LoraList(data=[*reversed(served), *(LoraObject(name=name, error=why) for name, why in rejected.items())])


def _lora(lora: Lora) -> LoraObject:
    return LoraObject(
        name=lora.name,
        default_scale=lora.scale,
        rank=None if lora.is_merged else lora.columns,
        in_pool=None if lora.is_merged else lora.in_pool,
        changes=lora.changes,
    )
