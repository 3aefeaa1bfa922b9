"""Conversions of single files in the cache: once per content, whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypergen_export.errors import BadOptionError, NoSpaceError, NotADiffusersPipelineError, UnsupportedModelError
from hypergen_export.repository.export import ExportRequest, export
from hypergen_export.repository.single_file import SingleFileOptions, convert_once, is_single_file
from hypergen_export.single_files import folder as conversion
from support.single_files import save_folder, save_single_file

_FIRST = "model.diffusion_model.input_blocks.0.0.bias"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("single")
    return save_single_file(place / "model.safetensors", save_folder(place / "folder", "sd-1"), "sd-1")


def options(tmp_path: Path, prediction_type: str | None = None) -> SingleFileOptions:
    return SingleFileOptions(cache_dir=tmp_path / "cache", prediction_type=prediction_type)


def first_bias(folder: Path) -> torch.Tensor:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"]


def test_a_file_is_converted_once(file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    folder = convert_once(str(file), options(tmp_path), told.append)
    before = {each: each.stat().st_ino for each in folder.rglob("*")}
    assert convert_once(str(file), options(tmp_path), told.append) == folder
    assert {each: each.stat().st_ino for each in folder.rglob("*")} == before
    assert told == ["a Stable Diffusion 1.x model"] * 2


def test_files_of_equal_names_sizes_and_times_are_told_apart(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    save_file(load_file(file) | {_FIRST: torch.full((32,), 7.0)}, other, {"format": "pt"})
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert other.stat().st_size == file.stat().st_size
    first, second = (convert_once(str(each), options(tmp_path), lambda _: None) for each in (file, other))
    assert first != second
    assert first_bias(second).eq(7.0).all()
    assert not first_bias(first).eq(7.0).any()


def test_what_a_file_is_told_to_predict_is_another_conversion(file: Path, tmp_path: Path) -> None:
    plain = convert_once(str(file), options(tmp_path), lambda _: None)
    velocity = convert_once(str(file), options(tmp_path, "v_prediction"), lambda _: None)
    assert plain != velocity
    assert '"prediction_type": "v_prediction"' in (velocity / "scheduler" / "scheduler_config.json").read_text()


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
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="GGUF is not read"):
        is_single_file(str(tmp_path / "model.gguf"))
    (tmp_path / "model.txt").write_text("a model")
    with pytest.raises(NotADiffusersPipelineError, match="is a file"):
        export(ExportRequest(model=str(tmp_path / "model.txt"), output=tmp_path / "out"))
    velocity = ExportRequest(
        model=str(checkpoint_folder), output=tmp_path / "out", single_files=options(tmp_path, "v_prediction")
    )
    with pytest.raises(BadOptionError, match="only for single files"):
        export(velocity)
