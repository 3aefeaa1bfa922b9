"""Shapes of a component's TensorRT engine: its optimization profiles and the batches recorded as CUDA graphs.

One profile per image size, with a fixed height and width and a free batch. Not one profile for a range of sizes:
- TensorRT optimizes kernels for one shape of a profile, so each size gets its own kernels;
- Triton's backend selects the profile nearest to a request, but compares axes shifted by one; here exactly one profile
  admits a request, so its choice does not matter;
- a CUDA graph has one shape, so the sizes must be known anyway.
Other sizes cannot be generated: the sampler's parameter `sizes` lists the sizes that are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypergen_export.checkpoints.components import IMAGE_AXES, Component, Sizes
from hypergen_export.engines.engine import Size

Shape = tuple[int, ...]

# Batch that profiles are optimized for: one image with guidance, for latency. A larger batch fills the GPU anyway.
_USUAL_ROWS = 2
# Rows of one image without and with guidance, and of two images. Kernels of larger batches outlast their launches.
_GRAPH_ROWS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Smallest, optimal and largest shape of an input in a profile, including the batch."""

    smallest: Shape
    usual: Shape
    largest: Shape


Profile = Mapping[str, Bounds]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The shape of a CUDA graph: the batch, and each input without it."""

    batch: int
    inputs: Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What engines are built for: images of `image_sizes`, and at most `rows` samples in a denoiser call.

    The denoiser's prompts are padded to multiples of `text_padding` tokens, of which there are at most `longest_text`.
    """

    sizes: Sizes
    image_sizes: Sequence[Size]
    rows: int
    text_padding: int | None = None
    longest_text: int | None = None


def largest_batch(component: Component, rows: int) -> int:
    """The maximum number of samples in one call: `rows`, but 1 if a sample is an image.

    One image fills the GPU, and the VAE would reserve gigabytes for each further one at load time.
    """
    return 1 if _works_on_pixels(component) else rows


def profiles(component: Component, shapes: Shapes) -> tuple[Profile, ...]:
    """The component's profiles: one per image size, or a single one if no input depends on it."""
    largest, usual = largest_batch(component, shapes.rows), typical_batch(component, shapes.rows)

    def bounds(size: Size) -> Profile:
        smallest_of = input_shapes(component, shapes, size, 1)
        usual_of = input_shapes(component, shapes, size, usual)
        largest_of = input_shapes(component, shapes, size, largest, text_tokens=shapes.longest_text)
        return {
            name: Bounds(smallest=smallest_of[name], usual=usual_of[name], largest=largest_of[name])
            for name in smallest_of
        }

    return tuple(bounds(size) for size in _distinct_sizes(component, shapes))


def graphs(component: Component, shapes: Shapes) -> tuple[Graph, ...]:
    """The CUDA graphs; none for the VAE, whose kernels are few and long."""
    if _works_on_pixels(component):
        return ()
    batches = [rows for rows in _GRAPH_ROWS if rows <= shapes.rows]
    return tuple(
        Graph(batch=batch, inputs={name: shape[1:] for name, shape in inputs.items()})
        for size in _distinct_sizes(component, shapes)
        for batch in batches
        for inputs in [input_shapes(component, shapes, size, batch)]
    )


def _distinct_sizes(component: Component, shapes: Shapes) -> Sequence[Size]:
    """All image sizes, or one if the inputs' shapes do not depend on them."""
    depends = any(axis in IMAGE_AXES for tensor in component.inputs for axis in tensor.axes)
    return shapes.image_sizes if depends else shapes.image_sizes[:1]


def typical_batch(component: Component, rows: int) -> int:
    """Samples in a call for one image: two with guidance, or 1 if a sample is an image."""
    return min(_USUAL_ROWS, largest_batch(component, rows))


def input_shapes(
    component: Component, shapes: Shapes, size: Size, batch: int, text_tokens: int | None = None
) -> dict[str, Shape]:
    """The shape of each input for `batch` samples of images of `size`, with short prompts by default."""
    width, height = (side // shapes.sizes["vae_scale_factor"] for side in size)
    tokens = text_tokens or shapes.text_padding
    return {
        tensor.name: tensor.shape(shapes.sizes, batch=batch, height=height, width=width, text_tokens=tokens)
        for tensor in component.inputs
    }


def _works_on_pixels(component: Component) -> bool:
    return any("height" in tensor.axes for tensor in (*component.inputs, *component.outputs))
