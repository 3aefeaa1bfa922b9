from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.hub import find_module_snapshot, first_missing_file, required_files
from hypergen_export.errors import UnknownModelError, UnsupportedModelError
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import SingleFileOptions
from support.single_text_encoders import save_text_encoder_file

from ..conftest import edit_json

# As on the hub: variants, single-file copies, a safety checker, other frameworks.
LISTING = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/flax_model.msgpack",
]


def test_only_what_an_export_reads_is_fetched() -> None:
    assert sorted(required_files(LISTING)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_of_xl_the_second_text_encoder_and_its_tokenizer_are_fetched_too() -> None:
    second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"]
    unused = ["text_encoder_2/model.fp16.safetensors", "text_encoder_2/openvino_model.bin"]
    assert set(required_files([*LISTING, *second, *unused])) == {*required_files(LISTING), *second}


def test_weights_that_are_not_needed_are_not_fetched(checkpoint_copy: Path) -> None:
    def is_needed(module: str) -> bool:
        return module != "unet"

    left_out = set(required_files(LISTING)) - set(required_files(LISTING, is_needed))
    assert left_out == {"unet/diffusion_pytorch_model.safetensors"}
    (checkpoint_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert first_missing_file(checkpoint_copy, is_needed) == ""
    (checkpoint_copy / "unet" / "config.json").unlink()
    assert first_missing_file(checkpoint_copy, is_needed) == "unet/config.json"


def test_of_something_else_only_small_files_are_fetched() -> None:
    listing = ["config.json", "model-00001-of-00004.safetensors", "tokenizer.json", "generation_config.json"]
    fetched = required_files(listing)
    assert "model-00001-of-00004.safetensors" not in fetched
    assert set(listing[:1]) <= set(fetched)


def remove(*files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def split(folder: Path) -> None:
    """The UNet's weights in two files, the second of which is not there."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = sorted(tensors)
    places = {name: shards[number % 2] for number, name in enumerate(names)}
    save_file({name: tensors[name] for name in names[::2]}, folder / "unet" / shards[0], {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def unlisted_split(folder: Path) -> None:
    split(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()


def dangling(folder: Path) -> None:
    """As an interrupted or pruned cache has it: a link to a blob that is not there."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to(folder / "blobs" / "gone")


INCOMPLETE = [
    (remove("model_index.json"), "model_index.json"),
    (remove("unet/config.json"), "unet/config.json"),
    (remove("unet/diffusion_pytorch_model.safetensors"), "unet's weights"),
    (split, "unet/diffusion_pytorch_model-00002-of-00002.safetensors"),
    (unlisted_split, "unet/diffusion_pytorch_model-00002-of-00002.safetensors"),
    (dangling, "vae's weights"),
    (remove("tokenizer/vocab.json"), "tokenizer's vocabulary"),
    (remove("tokenizer/merges.txt"), "tokenizer's vocabulary"),
    (remove("scheduler/scheduler_config.json"), "scheduler/scheduler_config.json"),
]


class FakeHub:
    """The hub's client: a snapshot that is here, and what the hub itself has, or that it cannot be reached."""

    def __init__(self, here: Path, there: Path | None) -> None:
        self.here = here
        self.there = there
        self.fetched: list[list[str]] = []

    def snapshot_download(
        self, model: str, *, local_files_only: bool = False, allow_patterns: list[str] | None = None
    ) -> str:
        assert model == "owner/model"
        if not local_files_only:
            assert self.there is not None
            assert allow_patterns is not None
            self.fetched.append(allow_patterns)
            for name in allow_patterns:
                shutil.copy(self.there / name, self.here / name)
        return str(self.here)

    def HfApi(self) -> Any:  # noqa: N802
        def model_info(model: str) -> Any:
            assert model == "owner/model"
            if self.there is None:
                raise ConnectionError("no network\nat all")
            names = (path.relative_to(self.there).as_posix() for path in self.there.rglob("*") if path.is_file())
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

        return SimpleNamespace(model_info=model_info)


@pytest.fixture
def hub_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path | None], FakeHub]:
    def make(here: Path, there: Path | None) -> FakeHub:
        hub = FakeHub(here, there)
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        return hub

    return make


@pytest.mark.parametrize(("change", "lacks"), INCOMPLETE)
def test_a_snapshot_that_lacks_a_file_is_fetched_or_refused_with_its_name(
    change: Callable[[Path], None],
    lacks: str,
    checkpoint_folder: Path,
    checkpoint_copy: Path,
    hub_of: Callable[[Path, Path | None], FakeHub],
) -> None:
    change(checkpoint_copy)
    assert first_missing_file(checkpoint_copy) == lacks
    hub_of(checkpoint_copy, None)
    with pytest.raises(UnknownModelError) as caught:
        open_checkpoint("owner/model")
    assert str(caught.value) == (
        f"owner/model: the cached copy lacks {lacks}, and the hub cannot provide it (no network)"
    )
    shutil.rmtree(checkpoint_copy / "blobs", ignore_errors=True)
    if change is dangling:
        (checkpoint_copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    if change in (split, unlisted_split):
        for file in (checkpoint_copy / "unet").glob("diffusion*"):
            file.unlink()
    hub = hub_of(checkpoint_copy, checkpoint_folder)
    assert open_checkpoint("owner/model").folder == checkpoint_copy
    assert first_missing_file(checkpoint_copy) == ""
    assert len(hub.fetched) == 1


def test_a_complete_snapshot_is_used_without_asking_the_hub(
    checkpoint_copy: Path, hub_of: Callable[[Path, Path | None], FakeHub]
) -> None:
    hub = hub_of(checkpoint_copy, None)
    assert open_checkpoint("owner/model").folder == checkpoint_copy
    assert not hub.fetched


def test_weights_of_replaced_parts_are_neither_fetched_nor_required(
    checkpoint_folder: Path, checkpoint_copy: Path, tmp_path: Path, hub_of: Callable[[Path, Path | None], FakeHub]
) -> None:
    for weights in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (checkpoint_copy / weights).unlink()
    hub_of(checkpoint_copy, None)

    def opened(model: str, *text_encoders: Path | str) -> Checkpoint:
        request = ExportRequest(
            model=model,
            output=tmp_path / "out",
            single_files=SingleFileOptions(cache_dir=tmp_path / "cache"),
            vae=str(checkpoint_folder),
            text_encoders=tuple(map(str, text_encoders)),
        )
        return open_request(request, lambda _: None)

    ours = opened("owner/model", checkpoint_folder)
    assert ours.folder == checkpoint_copy
    assert ours.folder_of("text_encoder") == checkpoint_folder / "text_encoder"
    assert ours.folder_of("vae") == checkpoint_folder / "vae"
    file = save_text_encoder_file(tmp_path / "clip_l.safetensors", checkpoint_folder, "text_encoder", "CLIP")
    for theirs in (opened("owner/model", file), opened(str(checkpoint_folder), "owner/model", file)):
        assert theirs.folder_of("text_encoder").is_relative_to(tmp_path / "cache")
        assert theirs.folder_of("tokenizer") == checkpoint_copy / "tokenizer"


@pytest.mark.parametrize("part", ["", "vae"], ids=["a module", "a pipeline"])
def test_a_cached_vae_is_used_without_asking_the_hub(
    part: str, checkpoint_copy: Path, hub_of: Callable[[Path, Path | None], FakeHub]
) -> None:
    here = checkpoint_copy if part else checkpoint_copy / "vae"
    hub_of(here, None)
    assert find_module_snapshot("owner/model") == here
    (here / part / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match="the hub cannot provide it"):
        find_module_snapshot("owner/model")


def test_a_snapshot_of_another_pipeline_is_refused_for_what_it_is(
    checkpoint_copy: Path, hub_of: Callable[[Path, Path | None], FakeHub]
) -> None:
    edit_json(checkpoint_copy / "model_index.json", _class_name="AuraFlowPipeline")
    shutil.rmtree(checkpoint_copy / "tokenizer")
    hub_of(checkpoint_copy, None)
    with pytest.raises(UnsupportedModelError, match="AuraFlowPipeline is not supported"):
        open_checkpoint("owner/model")


@pytest.mark.parametrize("content", ["[]", "{", '"a"'])
def test_a_snapshot_whose_index_is_broken_is_not_complete(content: str, checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model_index.json").write_text(content)
    assert first_missing_file(checkpoint_copy) == "model_index.json"
