from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.checkpoints.defaults import checkpoint_parameters, max_reference_tokens, notices
from hypergen_export.errors import BrokenCheckpointError
from support.miniature import save_miniature
from support.pipelines import pipeline_of
from support.transformer_miniatures import MINIATURES, save_transformer_miniature

from ..conftest import edit_json


def parameters(folder: Path, **defaults: Any) -> dict[str, str]:
    if defaults:
        (folder / "hypergen_defaults.json").write_text(json.dumps(defaults))
    return checkpoint_parameters(open_checkpoint(str(folder)))


def steps_and_scale(found: dict[str, str]) -> tuple[str, str]:
    return found["default_num_inference_steps"], found["default_guidance_scale"]


@pytest.mark.parametrize(
    ("family", "steps", "guidance"),
    [
        ("sd-1", "50", "7.5"),
        ("sd-2", "50", "7.5"),
        ("sd-turbo", "4", "1"),
        ("lcm", "4", "8.5"),
        ("tcd", "4", "1"),
        ("sdxl", "50", "5"),
        ("sdxl-turbo", "4", "1"),
        ("sdxl-lightning", "4", "1"),
        ("lcm-sdxl", "4", "8.5"),
    ],
)
def test_default_steps_and_guidance_depend_on_scheduler_and_unet(
    family: str, steps: str, guidance: str, tmp_path: Path
) -> None:
    found = parameters(save_miniature(tmp_path, family=family))
    assert (found["default_num_inference_steps"], found["default_guidance_scale"]) == (steps, guidance)


@pytest.mark.parametrize("changes", [{"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}])
def test_trailing_timesteps_of_a_model_trained_to_zero_terminal_noise_are_no_sign_of_few_steps(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = save_miniature(tmp_path, family="sdxl-lightning")
    edit_json(folder / "scheduler" / "scheduler_config.json", **changes)
    assert parameters(folder)["default_num_inference_steps"] == "50"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("model_index.json", "stabilityai/sdxl-turbo"),
        ("unet/config.json", "/data/SDXL-Lightning/4step"),
        ("model_index.json", "me/painter-flash"),
    ],
)
def test_trailing_euler_is_that_of_a_few_step_model_only_where_its_name_says_so_too(
    part: str, name: str, tmp_path: Path
) -> None:
    folder = save_miniature(tmp_path / "painter", family="sdxl", scheduler={"timestep_spacing": "trailing"})
    assert steps_and_scale(parameters(folder)) == ("50", "5")
    assert notices(open_checkpoint(str(folder))) == []
    edit_json(folder / part, _name_or_path=name)
    assert steps_and_scale(parameters(folder)) == ("4", "1")
    (said,) = notices(open_checkpoint(str(folder)))
    assert said.startswith("taken for a few-step model (EulerDiscreteScheduler with trailing timesteps, and '")
    assert said.endswith("' in its name): by default 4 steps, guidance scale 1")
    assert parameters(folder, num_inference_steps=30, guidance_scale=6)["default_num_inference_steps"] == "30"
    assert notices(open_checkpoint(str(folder))) == [], "what its author states is no guess"


@pytest.mark.parametrize("place", ["my-sdxl-turbo", "models--me--xl-turbo/snapshots/abc123"])
def test_a_folders_or_the_hubs_name_tells_it_too(place: str, tmp_path: Path) -> None:
    folder = save_miniature(tmp_path / place, family="sdxl", scheduler={"timestep_spacing": "trailing"})
    assert parameters(folder)["default_num_inference_steps"] == "4"


@pytest.mark.parametrize(
    ("index", "is_said"),
    [
        ({"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}, True),
        ({"requires_safety_checker": True}, True),
        ({"safety_checker": [None, None], "requires_safety_checker": False}, False),
        ({"safety_checker": None}, False),
    ],
)
def test_a_safety_checker_that_is_not_run_is_reported(
    index: dict[str, Any], is_said: bool, checkpoint_copy: Path
) -> None:
    edit_json(checkpoint_copy / "model_index.json", **index)
    assert ["safety checker" in text for text in notices(open_checkpoint(str(checkpoint_copy)))] == [True] * is_said


def test_a_default_guidance_scale_of_zero_becomes_one(checkpoint_copy: Path) -> None:
    assert parameters(checkpoint_copy, guidance_scale=0.0)["default_guidance_scale"] == "1"


@pytest.mark.parametrize(("stated", "zeros"), [({}, "1"), ({"force_zeros_for_empty_prompt": False}, "0")])
def test_the_parameters_describe_the_architecture(tmp_path: Path, stated: dict[str, bool], zeros: str) -> None:
    folder = save_miniature(tmp_path, family="lcm-sdxl")
    edit_json(folder / "model_index.json", **stated)
    found = parameters(folder)
    assert found["components"] == "text_encoder,text_encoder_2,unet,vae_decoder,vae_encoder"
    assert found["guidance"] == "embedded"
    assert found["denoiser"] == "unet"
    assert found["denoiser_inputs"] == "encoder_hidden_states,text_embeds,size_embeds,timestep_cond"
    assert (found["guidance_width"], found["zeros_for_no_negative_prompt"]) == ("32", zeros)


def test_what_a_checkpoint_recommends_is_the_default(checkpoint_copy: Path) -> None:
    stated = {"num_inference_steps": 20, "guidance_scale": 3, "width": 96, "height": 72, "max_size": 256}
    found = parameters(checkpoint_copy, **stated, clip_skip=1)
    assert (found["default_clip_skip"], found["max_clip_skip"]) == ("1", "2")
    assert found["default_num_inference_steps"] == "20"
    assert found["default_guidance_scale"] == "3"
    assert (found["default_width"], found["default_height"]) == ("96", "72")
    assert (found["min_size"], found["max_size"]) == ("64", "256")


@pytest.mark.parametrize(
    ("sample_size", "sides", "limits"),
    [
        (64, ("512", "512"), ("64", "1024")),
        (96, ("768", "768"), ("64", "1536")),
        (4, ("32", "32"), ("32", "1024")),
        ([8, 12], ("96", "64"), ("64", "1024")),
    ],
)
def test_sizes_are_derived_from_the_unets_training_size(
    checkpoint_copy: Path, sample_size: Any, sides: tuple[str, str], limits: tuple[str, str]
) -> None:
    edit_json(checkpoint_copy / "unet" / "config.json", sample_size=sample_size)
    found = parameters(checkpoint_copy)
    assert (found["default_width"], found["default_height"]) == sides
    assert (found["min_size"], found["max_size"]) == limits


def test_limits_are_multiples_of_the_vaes_factor(checkpoint_copy: Path) -> None:
    found = parameters(checkpoint_copy, min_size=33, max_size=999)
    assert (found["min_size"], found["max_size"]) == ("40", "992")


def test_suggestions_are_written_one_per_line(checkpoint_copy: Path) -> None:
    assert parameters(checkpoint_copy)["suggestions"] == ""
    prompts = ["a rocket, on yellow", "Crème brûlée"]
    assert parameters(checkpoint_copy, suggestions=prompts)["suggestions"].splitlines() == prompts


@pytest.mark.parametrize(
    "defaults",
    [
        {"width": 100},
        {"max_size": 32},
        {"num_inference_steps": "many"},
        {"suggestions": "a rocket"},
        {"suggestions": ["two\nlines"]},
    ],
)
def test_impossible_defaults_are_a_broken_checkpoint(checkpoint_copy: Path, defaults: dict[str, Any]) -> None:
    with pytest.raises(BrokenCheckpointError, match="default"):
        parameters(checkpoint_copy, **defaults)


@pytest.mark.parametrize(
    ("family", "sample_size", "saved_by", "width"),
    [
        ("sd-1", 32, "0.8.1", 512),
        ("sd-1", 32, "0.6.0.dev0", 512),
        ("sd-1", 96, "0.8.1", 768),
        ("sd-1", 32, "0.9.0", 256),
        ("sd-1", 32, "0.32.0", 256),
        ("sd-1", [32, 32], "0.8.1", 256),
        ("lcm", 32, "0.8.1", 256),
        ("sdxl", 32, "0.8.1", 256),
    ],
)
def test_the_size_that_an_old_config_states_is_what_its_pipeline_makes_of_it(
    family: str, sample_size: Any, saved_by: str, width: int, tmp_path: Path
) -> None:
    folder = save_miniature(tmp_path, family=family)
    edit_json(folder / "unet" / "config.json", sample_size=sample_size, _diffusers_version=saved_by)
    pipeline = pipeline_of(folder)
    theirs = pipeline.unet.config.sample_size
    assert (theirs if isinstance(theirs, int) else theirs[0]) * pipeline.vae_scale_factor == width
    assert parameters(folder)["default_width"] == str(width)


@pytest.mark.parametrize(
    ("family", "tokens", "steps", "scales"),
    [
        ("flux1-dev", 512, "28", ("0", "3.5", "20")),
        ("flux1-kontext", 512, "28", ("0", "2.5", "20")),
        ("flux1-schnell", 256, "4", ("1", "1", "1")),
    ],
)
def test_flux1_has_a_scale_without_identity_or_none(
    family: str, tokens: int, steps: str, scales: tuple[str, str, str], tmp_path: Path
) -> None:
    folder = save_transformer_miniature(tmp_path, family)
    found = parameters(folder)
    assert found["default_num_inference_steps"] == steps
    given = (found["min_guidance_scale"], found["default_guidance_scale"], found.get("max_guidance_scale", "20"))
    assert given == scales
    assert open_checkpoint(str(folder)).sizes["tokens"] == tokens


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("stable-diffusion-3", "sd3.5-medium", ("40", "4.5")),
        ("stable-diffusion-3-without-t5", "sd3-medium", ("28", "7")),
        ("stable-diffusion-3-without-t5", "sd3-turbo", ("4", "1")),
        ("flux1-dev", "FLUX.1-Krea-dev", ("28", "4.5")),
        ("flux1-dev", "FLUX.1-dev-turbo", ("8", "3.5")),
        ("flux1-dev", "flux-dev-schnell-4steps", ("4", "3.5")),
        ("chroma", "Chroma1-HD", ("40", "3")),
        ("chroma", "Chroma1-Flash", ("8", "1")),
        ("sana-1.5", "SANA1.5_1.6B_1024px_diffusers", ("20", "4.5")),
        ("sana", "Sana_600M_512px_diffusers", ("20", "4.5")),
        ("sana-sprint", "Sana_Sprint_1.6B_1024px_diffusers", ("2", "4.5")),
        ("qwen-image", "Qwen-Image-2512", ("50", "4")),
        ("qwen-image", "Qwen-Image-Lightning", ("8", "1")),
        ("qwen-image", "Qwen-Image-Lightning-4steps-V2.0", ("4", "1")),
        # Steps of training, not of sampling.
        ("flux1-dev", "flux-dev-portraits-v2-step5000", ("28", "3.5")),
        ("qwen-image", "qwen-image-epoch3_steps_1200", ("50", "4")),
        ("z-image", "Z-Image-Turbo", ("8", "0")),
    ],
)
def test_variants_of_transformers_have_the_steps_and_scale_of_their_cards(
    family: str, name: str, expected: tuple[str, str], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of(family), tmp_path / name)
    assert steps_and_scale(parameters(folder)) == expected


@pytest.mark.parametrize("family", MINIATURES)
def test_transformers_generate_1024x1024_by_default(family: str, tmp_path: Path) -> None:
    found = parameters(save_transformer_miniature(tmp_path, family))
    assert (found["default_width"], found["default_height"]) == ("1024", "1024")


@pytest.mark.parametrize(
    ("family", "stated", "expected", "tokens"),
    [
        ("flux2-klein", {}, ("4", "1048576", ""), 4 * 4096),
        ("flux2-klein", {"max_references": 2}, ("2", "1048576", ""), 2 * 4096),
        ("flux1-kontext", {}, ("1", "1062400", "672x1568,"), 4150),
        ("flux1-dev", {"max_references": 2}, ("0", "0", ""), 0),
    ],
)
def test_references_are_limited_by_the_family_and_by_the_checkpoint(
    family: str, stated: dict[str, int], expected: tuple[str, str, str], tokens: int, tmp_path: Path
) -> None:
    folder = save_transformer_miniature(tmp_path, family)
    (folder / "hypergen_defaults.json").write_text(json.dumps(stated))
    found = parameters(folder)
    assert (found["max_references"], found["max_reference_pixels"]) == expected[:2]
    assert found["preferred_reference_sizes"].startswith(expected[2])
    assert max_reference_tokens(open_checkpoint(str(folder))) == tokens


def test_kontext_prefers_the_sizes_of_diffusers(tmp_path: Path) -> None:
    found = parameters(save_transformer_miniature(tmp_path, "flux1-kontext"))["preferred_reference_sizes"]
    assert found == ",".join(f"{width}x{height}" for width, height in PREFERRED_KONTEXT_RESOLUTIONS)


@pytest.mark.parametrize("count", [0, 17, "many"])
def test_a_number_of_references_that_no_request_has_is_refused(count: object, tmp_path: Path) -> None:
    folder = save_transformer_miniature(tmp_path, "flux2-klein")
    (folder / "hypergen_defaults.json").write_text(json.dumps({"max_references": count}))
    with pytest.raises(BrokenCheckpointError, match="a default is missing or invalid"):
        parameters(folder)


def test_a_t5_whose_vocabulary_is_sentencepieces_alone_is_refused(tmp_path: Path) -> None:
    folder = save_transformer_miniature(tmp_path, "flux1-schnell")
    (folder / "tokenizer_2" / "tokenizer.json").rename(folder / "tokenizer_2" / "spiece.model")
    expected = r"tokenizer_2: has no vocabulary for a T5Tokenizer \(tokenizer\.json\)$"
    with pytest.raises(BrokenCheckpointError, match=expected):
        open_checkpoint(str(folder))
