"""Conversions of single files in the cache: once per content, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.errors import (
    BadOptionError,
    BrokenCheckpointError,
    NoSpaceError,
    NotADiffusersPipelineError,
    UnsupportedModelError,
)
from hypergen_export.repository.export import export
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import SingleFileOptions, convert_once
from hypergen_export.single_files import folder as conversion
from support.single_files import save_folder, save_single_file

_FIRST = "model.diffusion_model.input_blocks.0.0.bias"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("single")
    return save_single_file(place / "model.safetensors", save_folder(place / "folder", "sd-1"), "sd-1")


def options(tmp_path: Path, prediction_type: str | None = None) -> SingleFileOptions:
    return SingleFileOptions(cache_dir=tmp_path / "cache", prediction_type=prediction_type)


def converted(file: Path, tmp_path: Path, prediction_type: str | None = None) -> Path:
    return convert_once(str(file), options(tmp_path, prediction_type), lambda _: None).folder


def first_bias(folder: Path) -> torch.Tensor:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"]


def test_a_file_is_converted_once(file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    folder = convert_once(str(file), options(tmp_path), told.append).folder
    before = {each: each.stat().st_ino for each in folder.rglob("*")}
    assert convert_once(str(file), options(tmp_path), told.append).folder == folder
    assert {each: each.stat().st_ino for each in folder.rglob("*")} == before
    assert told == ["a Stable Diffusion 1.x model"] * 2


def test_files_of_equal_names_sizes_and_times_are_told_apart(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    save_file(load_file(file) | {_FIRST: torch.full((32,), 7.0)}, other, {"format": "pt"})
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert other.stat().st_size == file.stat().st_size
    first, second = (converted(each, tmp_path) for each in (file, other))
    assert first != second
    assert first_bias(second).eq(7.0).all()
    assert not first_bias(first).eq(7.0).any()


def test_what_a_file_is_told_to_predict_is_another_conversion(file: Path, tmp_path: Path) -> None:
    plain, velocity = converted(file, tmp_path), converted(file, tmp_path, "v_prediction")
    assert plain != velocity
    assert '"prediction_type": "v_prediction"' in (velocity / "scheduler" / "scheduler_config.json").read_text()


def test_a_name_that_says_something_else_is_another_conversion(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = converted(file, tmp_path)
    monkeypatch.setattr("hypergen_export.repository.single_file.few_steps_word", lambda _: "turbo")
    assert converted(file, tmp_path) != plain


def test_starts_at_once_share_one_conversion(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, begun, waiting = [], threading.Event(), threading.Event()
    real = conversion.convert_single_file

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        begun.set()
        assert waiting.wait(30)  # until the second has said that it waits
        return real(*arguments)

    monkeypatch.setattr(conversion, "convert_single_file", counted)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(convert_once, str(file), options(tmp_path), lambda _: None)
        assert begun.wait(30)
        second = pool.submit(convert_once, str(file), options(tmp_path), lambda _: waiting.set())
        assert first.result() == second.result()
    assert len(calls) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(conversion, "write_tensors", full)
    with pytest.raises(NoSpaceError, match="the disk is full"):
        convert_once(str(file), options(tmp_path), lambda _: None)
    assert [each for each in (tmp_path / "cache" / "checkpoints").iterdir() if not each.name.endswith(".lock")] == []


def test_the_exporter_refuses_what_it_does_not_read(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("a model")
    with pytest.raises(NotADiffusersPipelineError, match="is a file"):
        export(ExportRequest(model=str(tmp_path / "model.txt"), output=tmp_path / "out"))
    velocity = ExportRequest(
        model=str(checkpoint_folder), output=tmp_path / "out", single_files=options(tmp_path, "v_prediction")
    )
    with pytest.raises(BadOptionError, match="only for single files"):
        export(velocity)


def save_without(file: Path, prefix: str, tmp_path: Path) -> Path:
    kept = {name: each for name, each in load_file(file).items() if not name.startswith(prefix)}
    save_file(kept, tmp_path / "cut.safetensors")
    return tmp_path / "cut.safetensors"


@pytest.mark.parametrize(
    ("prefix", "named"),
    [("first_stage_model.", "has no vae: see --vae"), ("cond_stage_model.", "no text_encoder: see --text-encoder")],
)
def test_a_missing_part_is_named_with_the_option_that_gives_it(
    prefix: str, named: str, file: Path, tmp_path: Path
) -> None:
    cut = save_without(file, prefix, tmp_path)
    request = ExportRequest(model=str(cut), output=tmp_path / "out", single_files=options(tmp_path))
    with pytest.raises(BrokenCheckpointError, match=named):
        export(request)


def test_the_parts_of_a_folder_complete_a_file(file: Path, tmp_path: Path) -> None:
    folder, cut = file.parent / "folder", save_without(file, "first_stage_model.", tmp_path)
    cut = save_without(cut, "cond_stage_model.", tmp_path)
    request = ExportRequest(
        model=str(cut),
        output=tmp_path / "out",
        single_files=options(tmp_path),
        vae=str(folder),
        text_encoders=(str(folder),),
    )
    checkpoint = open_request(request, lambda _: None)
    assert checkpoint.folder_of("vae") == folder / "vae"
    assert checkpoint.folder_of("text_encoder") == folder / "text_encoder"
    assert checkpoint.folder_of("tokenizer") == folder / "tokenizer"
    assert checkpoint.folder_of("unet") == converted(cut, tmp_path) / "unet"
    assert checkpoint.sizes == open_checkpoint(str(folder)).sizes


def save_vae(place: Path, folder: Path, names: str) -> Path:
    """A VAE's file by one of the three kinds of names."""
    if names == "tiny":
        vae = AutoencoderTiny(encoder_block_out_channels=(64,) * 4, decoder_block_out_channels=(64,) * 4)
        vae.save_pretrained(place / "taesd")
        return place / "taesd" / "diffusion_pytorch_model.safetensors"
    if names == "diffusers":
        return folder / "vae" / "diffusion_pytorch_model.safetensors"
    own = {
        name.removeprefix("first_stage_model."): each.clone()
        for name, each in load_file(folder.parent / "model.safetensors").items()
        if name.startswith("first_stage_model.")
    }
    save_file(own, place / "vae.safetensors")
    return place / "vae.safetensors"


@pytest.mark.parametrize("names", ["diffusers", "latent diffusion", "tiny"])
def test_a_vae_file_becomes_the_folder_that_it_was_made_of(names: str, file: Path, tmp_path: Path) -> None:
    folder = file.parent / "folder"
    vae = save_vae(tmp_path, folder, names)
    request = ExportRequest(model=str(folder), output=tmp_path / "out", single_files=options(tmp_path), vae=str(vae))
    checkpoint = open_request(request, lambda _: None)
    source = tmp_path / "taesd" if names == "tiny" else folder / "vae"
    given = load_file(checkpoint.folder_of("vae") / "diffusion_pytorch_model.safetensors")
    expected = load_file(source / "diffusion_pytorch_model.safetensors")
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    config, theirs = (json.loads((each / "config.json").read_text()) for each in (checkpoint.folder_of("vae"), source))
    assert {
        name: config[name] for name in ("_class_name", "latent_channels", "block_out_channels", "scaling_factor")
    } == {name: theirs[name] for name in ("_class_name", "latent_channels", "block_out_channels", "scaling_factor")}
    assert checkpoint.family.modules["vae"] == f"diffusers.{config['_class_name']}"


def test_a_vae_of_another_scale_is_told_and_one_of_other_channels_refused(file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    folder = file.parent / "folder"
    for name, change in (("scaled", {"scaling_factor": 0.13025}), ("wide", {"latent_channels": 16})):
        vae = Path(shutil.copytree(folder / "vae", tmp_path / name))
        config = json.loads((vae / "config.json").read_text())
        (vae / "config.json").write_text(json.dumps(config | change))
    request = ExportRequest(model=str(folder), output=tmp_path / "out", vae=str(tmp_path / "scaled"))
    open_request(request, told.append)
    assert told == ["its VAE is replaced by one with another scaling factor (0.13025, not 0.18215)"]
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scaling_factor"]  # as in stabilityai/sd-vae-ft-mse, which diffusers 0.4 saved
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    open_request(request, told.append)
    assert len(told) == 1, "diffusers' default is the same"
    with pytest.raises(UnsupportedModelError, match="takes 4 channels, its VAE gives 16"):
        open_request(dataclasses.replace(request, vae=str(tmp_path / "wide")), lambda _: None)
    with pytest.raises(BadOptionError, match="is UNet2DConditionModel"):
        open_request(dataclasses.replace(request, vae=str(folder / "unet")), lambda _: None)
    with pytest.raises(BadOptionError, match="no such folder"):
        open_request(dataclasses.replace(request, vae="./nowhere"), lambda _: None)
