"""Example tensors for a component: what it is traced with and what it is compared on.

Values are seeded, so that every export compares the same numbers.
"""

from collections.abc import Callable, Mapping

import torch

from hypergen_export.components import Component, Sizes, Tensor

Fill = Callable[[tuple[int, ...], Sizes, torch.Generator], torch.Tensor]


def _normal(shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _token(shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, sizes["vocabulary"], shape, generator=generator, dtype=torch.int32)


def _timestep(shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    # Another one per sample: a model that shared one over the batch would be noticed.
    return torch.linspace(1.0, 999.0, shape[0] + 1)[1:].expand(shape).clone()


def _pixel(shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


VALUES: Mapping[str, Fill] = {"normal": _normal, "token": _token, "timestep": _timestep, "pixel": _pixel}


def example_inputs(
    component: Component, sizes: Sizes, *, batch: int, height: int, width: int
) -> tuple[torch.Tensor, ...]:
    """The component's inputs for `batch` samples whose latents are `height` × `width`, in the table's order."""
    generator = torch.Generator().manual_seed(batch * 10_000 + height * 100 + width)

    def fill(tensor: Tensor) -> torch.Tensor:
        shape = tensor.shape(sizes, batch=batch, height=height, width=width)
        return VALUES[tensor.example](shape, sizes, generator)

    return tuple(fill(tensor) for tensor in component.inputs)
