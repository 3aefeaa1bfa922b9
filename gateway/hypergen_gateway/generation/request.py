"""A client's request for images, validated and complete: the one form in which it goes through the gateway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hypergen_gateway.generation.backend import GenerationRequest, ModelDescription
from hypergen_gateway.generation.image_inputs import Compositing, InitImage
from hypergen_gateway.generation.images import PNG, FileFormat
from hypergen_gateway.generation.sizes import Size

Operation = Literal["image_generation", "image_edit"]
Quality = Literal["low", "medium", "high"]


@dataclass(frozen=True, kw_only=True)
class Client:
    """The sender of a request, as its headers describe it."""

    owner: str = ""  # a digest of the credentials
    idempotency_key: str | None = None
    is_retry: bool = False
    may_return: bool = False  # only a client with an idempotency key or a retry counter can
    read_timeout: float | None = None  # seconds the client waits for the next byte
    expects_links: bool = False  # too old to expect base64 unless it asks for it


@dataclass(frozen=True, kw_only=True, eq=False)
class SubRequest:
    """Images that the backend generates together: of one size, from the same inputs."""

    generation: GenerationRequest
    first_index: int = 0
    compositing: Compositing | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientRequest:
    """What a client asks for: the images, the form of the response, and the client itself."""

    sub_requests: Sequence[SubRequest]
    model: ModelDescription
    file_format: FileFormat = PNG
    operation: Operation = "image_generation"
    quality: Quality = "medium"
    stream: bool = False
    links: bool = False  # the response links to the images rather than containing them
    deadline: float | None = None  # seconds
    client: Client = Client()
    fingerprint: str = ""  # digest of route, fields and uploaded pixels; empty if the client cannot return

    @property
    def num_images(self) -> int:
        """The number of images."""
        return sum(sub_request.generation.num_images for sub_request in self.sub_requests)

    @property
    def num_inference_steps(self) -> int:
        """The requested steps per image."""
        return self.sub_requests[0].generation.num_inference_steps

    @property
    def prompt(self) -> str:
        """The prompt; empty for a variation."""
        return self.sub_requests[0].generation.prompt

    @property
    def generated_sizes(self) -> list[Size]:
        """The distinct sizes in which images are generated that are sent in another size."""
        sizes = [
            (generated, sub_request.compositing)
            for sub_request in self.sub_requests
            for generated in [(sub_request.generation.width, sub_request.generation.height)]
        ]
        return list(dict.fromkeys(size for size, compositing in sizes if compositing and compositing.size != size))

    @property
    def nbytes(self) -> int:
        """The memory taken by the init images."""
        generations = [each.generation for each in self.sub_requests]
        inputs = [array for each in generations for array in (each.image, each.mask, each.references)]
        compositings = [each.compositing for each in self.sub_requests if each.compositing is not None]
        kept = [array for each in compositings for array in (each.kept, each.mask)]
        # Several images may start from the same one.
        arrays = {id(array): array for array in (*inputs, *kept) if array is not None}
        return sum(array.nbytes for array in arrays.values())


def split(generation: GenerationRequest, init_images: Sequence[InitImage], size: Size | None) -> list[SubRequest]:
    """What the backend is asked for; image i starts from init image i mod k.

    `size` is the requested one, None for the one generated. With init images, it has been applied to them already.
    """
    if not init_images:
        is_scaled = size not in (None, (generation.width, generation.height))
        return [SubRequest(generation=generation, compositing=Compositing(size=size) if size and is_scaled else None)]
    if len(init_images) == 1:
        return [_start_from(init_images[0], generation)]
    return [
        replace(
            _start_from(
                init_images[index % len(init_images)], replace(generation, num_images=1, seed=generation.seed + index)
            ),
            first_index=index,
        )
        for index in range(generation.num_images)
    ]


def _start_from(init_image: InitImage, generation: GenerationRequest) -> SubRequest:
    width, height = init_image.size
    return SubRequest(
        generation=replace(
            generation,
            width=width,
            height=height,
            image=init_image.image,
            mask=init_image.mask,
            references=init_image.references,
            reference_sizes=init_image.reference_sizes,
        ),
        compositing=init_image.compositing,
    )
