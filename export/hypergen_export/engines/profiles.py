"""The shapes that a component's TensorRT engine is built for: its profiles, and the batches worth a CUDA graph.

One profile per size, of fixed height and width, free in the batch alone. Not one that covers a range of sizes, because
- TensorRT chooses kernels for one shape of a profile; each size then has its own, and no other size pays for it;
- Triton's backend takes the profile nearest to a request, and measures that distance one axis off; here exactly one
  profile admits a request, so there is nothing to choose;
- a CUDA graph holds for one shape, so the sizes that matter must be known anyway.
A size that is not built in cannot be drawn: the sampler's parameter `sizes` names those that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypergen_export.checkpoints.components import Component, Sizes
from hypergen_export.engines.engine import Size

Shape = tuple[int, ...]

# What is tuned for: one image with guidance, whose latency a user waits for. A larger batch fills the GPU anyway.
_USUAL_ROWS = 2
# Rows of one image without and with guidance, and of two images: beyond, the kernels take longer than their launches.
_GRAPH_ROWS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The shapes that an input may have in a profile, the batch first, and the one that is tuned for."""

    smallest: Shape
    usual: Shape
    largest: Shape


Profile = Mapping[str, Bounds]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A shape to record as a CUDA graph: the batch, and each input without it."""

    batch: int
    inputs: Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What an export is for: pictures of `pictures`, and at most `rows` samples in a UNet call."""

    sizes: Sizes
    pictures: Sequence[Size]
    rows: int


def largest_batch(component: Component, rows: int) -> int:
    """Samples in one call: `rows`, but one where a sample is a whole picture.

    A picture fills the GPU by itself, and its VAE would need gigabytes for each further one, reserved at load.
    """
    return 1 if _works_on_pixels(component) else rows


def profiles(component: Component, shapes: Shapes) -> tuple[Profile, ...]:
    """The component's profiles, one per size of its inputs: a single one where no input has a side."""
    largest, usual = largest_batch(component, shapes.rows), usual_batch(component, shapes.rows)

    def bounds(size: Size) -> Profile:
        smallest_of, usual_of, largest_of = (input_shapes(component, shapes, size, b) for b in (1, usual, largest))
        return {
            name: Bounds(smallest=smallest_of[name], usual=usual_of[name], largest=largest_of[name])
            for name in smallest_of
        }

    return tuple(bounds(size) for size in _distinct_sizes(component, shapes))


def graphs(component: Component, shapes: Shapes) -> tuple[Graph, ...]:
    """The shapes to record; none of the VAE, whose few kernels are long."""
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
    """Every size, or any one where the inputs' shapes do not depend on it."""
    depends = any(len(tensor.free_axes()) > 1 for tensor in component.inputs)
    return shapes.pictures if depends else shapes.pictures[:1]


def usual_batch(component: Component, rows: int) -> int:
    """Samples in the calls for one picture: two under guidance, and one where a sample is a whole picture."""
    return min(_USUAL_ROWS, largest_batch(component, rows))


def input_shapes(component: Component, shapes: Shapes, size: Size, batch: int) -> dict[str, Shape]:
    """The shape of each input for `batch` samples of pictures of `size`."""
    width, height = (side // shapes.sizes["vae_scale_factor"] for side in size)
    return {
        tensor.name: tensor.shape(shapes.sizes, batch=batch, height=height, width=width) for tensor in component.inputs
    }


def _works_on_pixels(component: Component) -> bool:
    return any("height" in tensor.axes for tensor in (*component.inputs, *component.outputs))
