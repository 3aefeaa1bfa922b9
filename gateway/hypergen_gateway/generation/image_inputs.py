"""Uploaded images to init images, masks and references in sizes that the model takes, and compositing the result.

As in OpenAI's API, transparent pixels of a mask are repainted. Blocks, so it is called in a thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import ModelDescription, Pixels, Sides
from hypergen_gateway.generation.images import decode
from hypergen_gateway.generation.references import reference_size, to_reference
from hypergen_gateway.generation.sizes import Box, Size, SizePolicy, crop_box, nearest_size

# Pixels less opaque than this are repainted.
_OPAQUE = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Uploads:
    """The uploaded images and the mask of the first one; `images_param` is the field name that the client used."""

    images: Sequence[BinaryIO]
    mask: BinaryIO | None
    images_param: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Compositing:
    """Turns a generated image into one of the requested size, with the unmasked pixels of the input image."""

    size: Size
    kept: Pixels | None = None  # the input image, RGB [height, width, 3] in `size`
    mask: Pixels | None = None  # [height, width]; 255 shows the generated image, 0 shows `kept`

    def apply(self, pixels: Pixels) -> Pixels:
        """The image in RGB, [height, width, 3] of `size`: scaled to cover it and cropped to its proportions."""
        height, width, _ = pixels.shape
        if (width, height) != self.size:
            box = crop_box((width, height), self.size)
            pixels = np.asarray(Image.fromarray(pixels).resize(self.size, Image.Resampling.LANCZOS, box=box))
        if self.kept is None or self.mask is None:
            return pixels
        return np.where(self.mask[..., None] > 0, pixels, self.kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class InitImage:
    """What images are generated from: an image to start from, reference images, or both."""

    size: Size  # that the model generates
    image: Pixels | None = None  # RGB [height, width, 3] of `size`
    mask: Pixels | None = None  # [height, width]; 255 is repainted, 0 stays
    compositing: Compositing
    references: Pixels | None = None  # as in `GenerationRequest`
    reference_sizes: Sides | None = None

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        arrays = (self.image, self.mask, self.compositing.kept, self.references)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True, kw_only=True)
class InitImageOptions:
    """How uploads become init images: at most `count`, scaled to `size`, or each in its own size if that is None.

    `keep_originals` is for a strength that may leave no step to take: the image is then returned unchanged.
    `are_references`: without a mask, the uploads are reference images.
    """

    size: Size | None
    count: int
    keep_originals: bool = False
    are_references: bool = False


def read_init_images(
    uploads: Uploads, options: InitImageOptions, model: ModelDescription, sizes: SizePolicy
) -> list[InitImage]:
    """The first `count` uploads as init images, or all together if the model sees them as references.

    All are decoded, so that a broken one is always reported.

    The first image's own size is legal whatever the policy, as it is the size of the response by default.

    Raises:
        InvalidRequestError: `param` is the field of the images, the mask or the size.
    """
    images = (decode(file, uploads.images_param) for file in uploads.images)
    first = next(images)
    if options.size not in (None, first.size):
        sizes.check(options.size, model)
    mask = _read_mask(uploads.mask, first) if uploads.mask is not None else _own_mask(first)
    if model.max_references and (options.are_references or mask is not None):
        _check_number(uploads, model, mask is not None)
        seen = images if mask is not None else itertools.chain([first], images)
        references = [to_reference(_flatten(image), uploads.images_param, model) for image in seen]
        return [_with_references(first, mask, references, options, model)]
    init_images = [_init_image(_flatten(first), mask, options, model)]
    for number, image in enumerate(images, start=1):
        if number < options.count:
            init_images.append(_init_image(_flatten(image), _own_mask(image), options, model))
    return init_images


def _check_number(uploads: Uploads, model: ModelDescription, is_masked: bool) -> None:
    most = model.max_references + (model.masked_image_yields if is_masked else 0)
    if len(uploads.images) > most:
        param = uploads.images_param
        raise InvalidRequestError(
            f"Invalid value for '{param}': {len(uploads.images)} images. The model takes at most {most} as references.",
            param,
        )


def _with_references(
    first: Image.Image,
    mask: Image.Image | None,
    references: Sequence[Pixels],
    options: InitImageOptions,
    model: ModelDescription,
) -> InitImage:
    """An image to generate from references; with a mask, also from the first upload, which the model sees anyway."""
    if mask is not None:
        init_image = _init_image(_flatten(first), mask, options, model)
    else:
        generated = nearest_size(options.size or reference_size(first.size, model), model)
        init_image = InitImage(size=generated, compositing=Compositing(size=options.size or first.size))
    if not references:
        return init_image
    return replace(
        init_image,
        references=np.concatenate([image.reshape(-1) for image in references]),
        reference_sizes=np.array([image.shape[:2] for image in references], dtype=np.int32),
    )


def _read_mask(file: BinaryIO, image: Image.Image) -> Image.Image:
    mask = decode(file, "mask", formats=("PNG",))
    if mask.size != image.size:
        sizes = f"{mask.width}x{mask.height} instead of {image.width}x{image.height}"
        raise InvalidRequestError(f"The mask must have the size of the first image: it is {sizes}.", "mask")
    repainted = _transparency(mask) if mask.mode == "RGBA" else None
    if repainted is None:
        raise InvalidRequestError(
            "The mask has no transparent pixels. It must be a PNG whose alpha is 0 where the image is regenerated.",
            "mask",
        )
    return repainted


def _own_mask(image: Image.Image) -> Image.Image | None:
    return _transparency(image) if image.mode == "RGBA" else None


def _transparency(image: Image.Image) -> Image.Image | None:
    """The mask given by an image's alpha: 255 where transparent, else 0; None if nothing is transparent."""
    mask = image.getchannel("A").point(lambda alpha: 0 if alpha >= _OPAQUE else 255)
    return mask if mask.getbbox() else None


def _flatten(image: Image.Image) -> Image.Image:
    """RGB, on a white background."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _init_image(
    image: Image.Image, mask: Image.Image | None, options: InitImageOptions, model: ModelDescription
) -> InitImage:
    """Crops an image to the requested size, if there is one, and fits it into the nearest generated size."""
    if options.size is not None:
        image = ImageOps.fit(image, options.size, Image.Resampling.LANCZOS)
        mask = mask and ImageOps.fit(mask, options.size, Image.Resampling.BOX)
    # A masked image is a reference, too, if the model takes any.
    is_seen = mask is not None and model.max_references > 0
    generated = nearest_size(reference_size(image.size, model) if is_seen else image.size, model)
    box = crop_box(generated, image.size)
    kept = np.asarray(image) if mask or options.keep_originals else None
    return InitImage(
        size=generated,
        image=_fit_into(image, generated, box, Image.Resampling.LANCZOS),
        mask=_binary(mask and _fit_into(mask, generated, box, Image.Resampling.BOX)),
        compositing=Compositing(size=image.size, kept=kept, mask=_binary(mask)),
    )


def _fit_into(image: Image.Image, size: Size, box: Box, resample: Image.Resampling) -> Pixels:
    """An image scaled into `box` of a larger one and mirrored around it.

    The model sees similar content in the margins, which are cropped from the result.
    """
    left, top, right, bottom = box
    scaled = np.asarray(image.resize((right - left, bottom - top), resample))
    margins = [(top, size[1] - bottom), (left, size[0] - right), *[(0, 0)] * (scaled.ndim - 2)]
    return np.pad(scaled, margins, mode="symmetric")


def _binary(mask: Image.Image | Pixels | None) -> Pixels | None:
    """255 wherever a pixel is to be repainted, if only in part."""
    if mask is None:
        return None
    return np.where(np.asarray(mask) > 0, np.uint8(255), np.uint8(0))
