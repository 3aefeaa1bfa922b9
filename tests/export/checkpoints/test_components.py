from __future__ import annotations

import pytest

from hypergen_export.checkpoints.components import Component, Tensor
from hypergen_export.checkpoints.families import FAMILIES
from hypergen_export.checkpoints.families.unet import STABLE_DIFFUSION, with_deep_cache
from hypergen_export.checkpoints.family import Family
from hypergen_export.conversion.examples import VALUES, example_inputs
from hypergen_export.conversion.wrappers import WRAPPERS

SIZES = {
    "tokens": 77,
    "tokens_3": 77,
    "encoder_tokens": 77,
    "clip_tokens": 77,
    "context_tokens": 77,
    "vocabulary": 49408,
    "vocabulary_2": 49408,
    "text_width": 768,
    "text_width_2": 1280,
    "context_width": 768,
    "pooled_width": 1280,
    "projection_width": 1280,
    "projection_width_2": 1280,
    "guidance_width": 256,
    "latent_channels": 4,
    "token_width": 16,
    "masked_channels": 5,
    "vae_scale_factor": 8,
    "deep_channels": 320,
    "time_width": 320,
    "sizes_width": 1536,
    "max_clip_skip": 12,
}
ALL = [each for family in FAMILIES for each in (*family.components, *with_deep_cache(family.components))]


@pytest.mark.parametrize("component", dict.fromkeys(ALL), ids=lambda component: component.name)
def test_every_component_has_a_wrapper_and_values_to_be_tried_on(component: Component) -> None:
    assert (component.wrapper or component.name) in WRAPPERS
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


@pytest.mark.parametrize("is_distilled", [False, True])
def test_a_pipeline_its_index_and_its_denoisers_inputs_belong_to_one_family(is_distilled: bool) -> None:
    families = [family for family in FAMILIES if family.is_named_by({"is_distilled": is_distilled})]
    keys = [(pipeline, frozenset(family.denoiser_inputs)) for family in families for pipeline in family.pipelines]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_components_agree_on_what_they_hand_to_each_other(family: Family) -> None:
    dims: dict[str, set[tuple[int, ...]]] = {}
    for component in with_deep_cache(family.components):
        for tensor in (*component.inputs, *component.outputs):
            if tensor.name != "encoder_hidden_states":  # of which each text encoder gives a share
                dims.setdefault(tensor.name, set()).add(tensor.dims(SIZES))
    assert {name: found for name, found in dims.items() if len(found) > 1} == {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_text_encoder_has_its_tokenizer_and_one_pools_where_it_is_wanted(family: Family) -> None:
    encoders = [each for each in family.components if each.inputs[0].name == "input_ids"]
    assert [each.name for each in family.text_encoders] == [each.name for each in encoders]
    pooled = {tensor.name for encoder in encoders for tensor in encoder.outputs if tensor.name == "text_embeds"}
    assert pooled == {name for name in family.denoiser_inputs if name == "text_embeds"}


def test_parts_that_are_known_or_expected_to_overflow_in_float16() -> None:
    found = {(family.name, each.name) for family in FAMILIES for each in family.components if each.overflows_float16}
    sana = ("sana", "sana-sprint")
    xl = ("stable-diffusion-xl", "stable-diffusion-xl-inpainting", "latent-consistency-xl", "instruct-pix2pix-xl")
    assert found == {
        *((family, component) for family in xl for component in ("vae_decoder", "vae_encoder")),
        *((family, "text_encoder_2") for family in ("flux1-dev", "flux1-kontext", "flux1-schnell")),
        ("chroma", "text_encoder"),
        *((family, part) for family in sana for part in ("text_encoder", "vae_decoder", "vae_encoder")),
        *((family, "text_encoder_3") for family in ("stable-diffusion-3", "stable-diffusion-3.5-medium")),
    }


def test_what_takes_most_memory_in_a_transformer_family_is_computed_as_typed_and_compared_in_parts() -> None:
    """Else an export in bfloat16 for OpenVINO would write its weights in float32."""
    families = [family for family in FAMILIES if family.denoiser.module == "transformer"]
    large = [each for family in families for each in family.components if each.module != "vae"]
    rest = {each.wrapper for each in large if not (each.is_typed and each.kept_layers)}
    assert rest == {"clip_pooled"}  # a quarter of a gigabyte


def test_example_prompts_end_at_another_place_each() -> None:
    (text_encoder, *_) = STABLE_DIFFUSION
    ids, mask, skipped = example_inputs(text_encoder, SIZES, batch=4, height=8, width=8)
    end = SIZES["vocabulary"] - 1
    assert [row.index(end) for row in ids.tolist()] == [1, 2, 3, 4]
    assert (ids[:, -1] == end).all()
    assert skipped.tolist() == [[0], [1], [2], [3]]
    assert len(set(map(tuple, mask.tolist()))) == 4


def test_examples_are_the_same_every_time_and_differ_within_the_batch() -> None:
    unet = next(component for component in STABLE_DIFFUSION if component.name == "unet")
    first, again = (example_inputs(unet, SIZES, batch=3, height=5, width=6) for _ in range(2))
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert len(set(map(tuple, first[1].tolist()))) == 3
