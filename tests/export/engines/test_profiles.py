"""The shapes of engines, from the table of components alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hypergen_export.checkpoints.families.flux2 import FLUX2
from hypergen_export.engines.profiles import Shapes, graphs, largest_batch, profiles, reference_rows

from ..conftest import COMPONENTS

SIZES = {
    "tokens": 77,
    "vocabulary": 49408,
    "text_width": 768,
    "context_width": 768,
    "time_width": 320,
    "latent_channels": 4,
    "vae_scale_factor": 8,
}
FLUX2_SIZES = {
    **SIZES,
    "tokens": 512,
    "latent_channels": 128,
    "token_width": 128,
    "vae_scale_factor": 16,
    "patch_size": 1,
}
SHAPES = Shapes(sizes=SIZES, image_sizes=((512, 512), (768, 512)), rows=16, text_padding=77, longest_text=16 * 77)


def test_the_unet_has_a_profile_per_size_with_a_free_batch() -> None:
    square, wide = profiles(COMPONENTS["unet"], SHAPES)
    assert (square["sample"].smallest, square["sample"].largest) == ((1, 4, 64, 64), (16, 4, 64, 64))
    assert (wide["sample"].smallest, wide["sample"].largest) == ((1, 4, 64, 96), (16, 4, 64, 96))
    assert (wide["time"].smallest, wide["time"].largest) == ((1, 320), (16, 320))
    assert wide["encoder_hidden_states"].largest == (16, 16 * 77, 768)


def test_profiles_are_optimized_for_one_image_with_guidance() -> None:
    assert {profile["sample"].usual[0] for profile in profiles(COMPONENTS["unet"], SHAPES)} == {2}


def test_a_component_that_does_not_depend_on_the_size_has_one_profile() -> None:
    (profile,) = profiles(COMPONENTS["text_encoder"], SHAPES)
    assert profile["input_ids"].largest == (16, 77)


@pytest.mark.parametrize(("name", "tensor"), [("vae_decoder", "latents"), ("vae_encoder", "image")])
def test_the_vae_processes_one_image_per_call(name: str, tensor: str) -> None:
    assert largest_batch(COMPONENTS[name], 16) == 1
    for profile in profiles(COMPONENTS[name], SHAPES):
        assert profile[tensor].smallest == profile[tensor].usual == profile[tensor].largest


def test_an_encoders_profile_counts_pixels() -> None:
    assert [profile["image"].usual for profile in profiles(COMPONENTS["vae_encoder"], SHAPES)] == [
        (1, 512, 512, 3),
        (1, 512, 768, 3),
    ]


def test_small_batches_of_every_size_have_a_cuda_graph() -> None:
    found = [(graph.batch, graph.inputs["sample"]) for graph in graphs(COMPONENTS["unet"], SHAPES)]
    sides = [(4, 64, 64), (4, 64, 96)]
    assert found == [(batch, side) for side in sides for batch in (1, 2, 4)]
    assert graphs(COMPONENTS["unet"], SHAPES)[0].inputs["time"] == (320,)
    assert graphs(COMPONENTS["vae_decoder"], SHAPES) == ()


def test_no_graph_is_larger_than_a_batch_may_be() -> None:
    small = Shapes(sizes=SIZES, image_sizes=((512, 512),), rows=2)
    assert [graph.batch for graph in graphs(COMPONENTS["text_encoder"], small)] == [1, 2]


def test_a_denoiser_has_a_profile_without_references_and_one_with_any_number_of_their_tokens() -> None:
    sizes = ((1024, 1024), (512, 512))
    shapes = Shapes(sizes=FLUX2_SIZES, image_sizes=sizes, rows=4, reference_tokens=4 * 4096)
    found = profiles(FLUX2[0].denoiser, shapes)
    bounds = [profile["references"] for profile in found]
    tokens = [(each.smallest[1], each.usual[1], each.largest[1]) for each in bounds]
    assert tokens == [(0, 0, 0), (1, 4096, 16384), (0, 0, 0), (1, 1024, 16384)]
    assert [profile["reference_positions"].largest for profile in found[:2]] == [(4, 0, 3), (2, 16384, 3)]
    assert {graph.inputs["references"] for graph in graphs(FLUX2[0].denoiser, shapes)} == {(0, 128)}


def test_a_call_with_references_has_as_many_tokens_as_one_without() -> None:
    shapes = Shapes(sizes=FLUX2_SIZES, image_sizes=((512, 512), (1024, 1024)), rows=16, reference_tokens=4096)
    assert reference_rows(shapes) == 8
    assert reference_rows(replace(shapes, rows=2)) == 2
    assert reference_rows(replace(shapes, image_sizes=())) == 16  # engines that take any shape


def test_the_encoder_of_references_has_one_profile_for_every_size_of_them() -> None:
    shapes = Shapes(sizes=FLUX2_SIZES, image_sizes=((1024, 1024), (2048, 512)), rows=4, reference_tokens=4096)
    (encoder,) = (each for each in FLUX2[0].components if each.name == "vae_encoder")
    (profile,) = profiles(encoder, shapes)
    bounds = profile["image"]
    assert (bounds.smallest, bounds.usual, bounds.largest) == ((1, 64, 64, 3), (1, 1024, 1024, 3), (1, 2048, 2048, 3))
