from __future__ import annotations

import pytest

from hypergen_export.components import FAMILIES, STABLE_DIFFUSION, Component, Tensor
from hypergen_export.examples import VALUES, example_inputs
from hypergen_export.wrappers import WRAPPERS

SIZES = {"tokens": 77, "vocabulary": 49408, "text_width": 768, "latent_channels": 4, "vae_scale_factor": 8}


@pytest.mark.parametrize("component", STABLE_DIFFUSION, ids=lambda component: component.name)
def test_every_component_has_a_wrapper_and_values_to_be_tried_on(component: Component) -> None:
    assert component.name in WRAPPERS
    assert {tensor.example for tensor in component.inputs} <= VALUES.keys()


def test_a_free_axis_is_minus_one_for_triton_and_follows_the_latents_in_an_example() -> None:
    image = Tensor(name="image", dtype="UINT8", axes=("height", "width", 3))
    assert image.dims(SIZES) == (-1, -1, 3)
    assert image.shape(SIZES, batch=2, height=9, width=7) == (2, 72, 56, 3)
    assert image.free_axes() == {0: "batch", 1: "height", 2: "width"}


def test_fixed_axes_are_the_checkpoints() -> None:
    states = Tensor(name="states", dtype="FP32", axes=("tokens", "text_width"))
    assert states.dims(SIZES) == (77, 768)
    assert states.free_axes() == {0: "batch"}


def test_a_pipeline_belongs_to_one_family() -> None:
    pipelines = [pipeline for family in FAMILIES for pipeline in family.pipelines]
    assert len(pipelines) == len(set(pipelines))


def test_components_agree_on_what_they_hand_to_each_other() -> None:
    dims: dict[str, set[tuple[int, ...]]] = {}
    for component in STABLE_DIFFUSION:
        for tensor in (*component.inputs, *component.outputs):
            dims.setdefault(tensor.name, set()).add(tensor.dims(SIZES))
    assert {name: found for name, found in dims.items() if len(found) > 1} == {}


def test_examples_are_the_same_every_time_and_differ_within_the_batch() -> None:
    unet = next(component for component in STABLE_DIFFUSION if component.name == "unet")
    first, again = (example_inputs(unet, SIZES, batch=3, height=5, width=6) for _ in range(2))
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert len(set(first[1].tolist())) == 3
