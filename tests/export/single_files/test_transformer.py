"""A transformer in one file becomes the transformer that it was made of, with the rest of a pipeline's folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypergen_export.errors import BadOptionError, BrokenCheckpointError, NotADiffusersPipelineError
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import SingleFileOptions
from support.single_transformers import NAMES, save_transformer_file

Folder = Callable[[str], Path]
PREFIX = "model.diffusion_model."


def request_of(file: Path, base: Path | None, tmp_path: Path) -> ExportRequest:
    return ExportRequest(
        model=str(file),
        output=tmp_path / "out",
        single_files=SingleFileOptions(cache_dir=tmp_path / "cache"),
        text_encoders=(str(base),) if base else (),
    )


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefixed"])
@pytest.mark.parametrize("family", NAMES)
def test_a_file_becomes_the_transformer_that_it_was_made_of(
    family: str, prefix: str, checkpoint_of: Folder, tmp_path: Path
) -> None:
    told: list[str] = []
    folder = checkpoint_of(family)
    file = save_transformer_file(tmp_path / f"{family}.safetensors", folder, NAMES[family], prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = open_request(request_of(file, folder, tmp_path), told.append)
    assert told == []
    (theirs,) = (folder / "transformer").glob("*.safetensors")
    (ours,) = checkpoint.folder_of("transformer").glob("*.safetensors")
    expected, given = load_file(theirs), load_file(ours)
    assert given.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(given[name], tensor)] == []
    assert checkpoint.folder_of("vae") == folder / "vae"
    assert (
        checkpoint.denoiser_config.items() >= {"guidance_embeds": family == "flux1-dev"}.items()
        or family[:5] != "flux1"
    )


def test_what_a_transformer_predicts_is_no_option(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    request = request_of(save_transformer_file(tmp_path / "a.safetensors", folder, {}, ""), folder, tmp_path)
    velocity = replace(request, single_files=replace(request.single_files, prediction_type="v_prediction"))
    with pytest.raises(BadOptionError, match="--prediction-type: only for models with a UNet"):
        open_request(velocity, lambda _: None)


def test_names_of_diffusers_stay(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    file = save_transformer_file(tmp_path / "diffusers.safetensors", folder, {}, "")
    checkpoint = open_request(request_of(file, folder, tmp_path), lambda _: None)
    (theirs,) = (folder / "transformer").glob("*.safetensors")
    (ours,) = checkpoint.folder_of("transformer").glob("*.safetensors")
    assert load_file(ours).keys() == load_file(theirs).keys()


def test_what_does_not_fit_is_one_line(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    file = save_transformer_file(tmp_path / "flux.safetensors", folder, NAMES["flux1-dev"], "")
    with pytest.raises(NotADiffusersPipelineError, match="pass the folder of its pipeline with --text-encoder"):
        open_request(request_of(file, None, tmp_path), lambda _: None)
    with pytest.raises((BrokenCheckpointError, NotADiffusersPipelineError), match=r"flux\.safetensors: ") as raised:
        open_request(request_of(file, checkpoint_of("z-image"), tmp_path), lambda _: None)
    assert "\n" not in str(raised.value)
    tensors = load_file(file)
    del tensors["double_blocks.0.img_attn.proj.bias"]
    save_file(tensors, file)
    with pytest.raises(BrokenCheckpointError, match=r"lacks tensors: double_blocks\.0\.img_attn\.proj\.bias"):
        open_request(request_of(file, folder, tmp_path), lambda _: None)


def test_text_encoders_in_the_file_are_left_out_and_the_start_says_so(checkpoint_of: Folder, tmp_path: Path) -> None:
    told: list[str] = []
    folder = checkpoint_of("stable-diffusion-3")
    file = save_transformer_file(tmp_path / "whole.safetensors", folder, NAMES["stable-diffusion-3"], PREFIX)
    save_file(load_file(file) | {"text_encoders.clip_l.logit_scale": torch.ones(1)}, file)
    open_request(request_of(file, folder, tmp_path), told.append)
    assert told == ["has text encoders or a VAE too, which are not served: those of --text-encoder and --vae are"]
