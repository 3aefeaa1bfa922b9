from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.checkpoints.lora import Lora, Placement, read_loras
from hypergen_export.conversion.examples import example_inputs
from hypergen_export.engines.tensorrt import Target
from hypergen_export.repository import cache_key
from hypergen_export.repository.cache_key import component_key, plan_key, pool_parts, repository_key, tokenizer_key
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.staging import PreviousExport
from hypergen_export.repository.task import ExportTask
from support.loras import lora_weights, save_by_diffusers
from support.miniature import EDITING_FAMILIES, FAMILIES, save_miniature
from support.transformer_miniatures import MINIATURES

from ..conftest import COMPONENTS, edit_json


def keys(folder: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(str(folder))
    parts = {name: component_key(checkpoint, component, ContentHashes()) for name, component in COMPONENTS.items()}
    return parts | {"tokenizer": tokenizer_key(checkpoint, checkpoint.family.text[0])}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_the_same_files_elsewhere_have_the_same_keys(checkpoint_folder: Path, checkpoint_copy: Path) -> None:
    assert changed(keys(checkpoint_folder), keys(checkpoint_copy)) == set()


@pytest.mark.parametrize(
    ("file", "affected"),
    [
        ("unet/diffusion_pytorch_model.safetensors", {"unet"}),
        ("vae/diffusion_pytorch_model.safetensors", {"vae_decoder", "vae_encoder"}),
        ("text_encoder/model.safetensors", {"text_encoder"}),
    ],
)
def test_a_key_depends_on_the_weights_content_and_not_on_their_time(
    checkpoint_copy: Path, file: str, affected: set[str]
) -> None:
    path = checkpoint_copy / file
    os.utime(path, (1, 1))
    before = keys(checkpoint_copy)
    os.utime(path, (2, 2))
    assert changed(before, keys(checkpoint_copy)) == set()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert changed(before, keys(checkpoint_copy)) == affected


def test_a_key_depends_on_the_configs_content(checkpoint_copy: Path) -> None:
    before = keys(checkpoint_copy)
    os.utime(checkpoint_copy / "vae" / "config.json", ns=(1, 1))
    assert changed(before, keys(checkpoint_copy)) == set()
    edit_json(checkpoint_copy / "vae" / "config.json", scaling_factor=0.5)
    assert changed(before, keys(checkpoint_copy)) == {"vae_decoder", "vae_encoder"}


@pytest.mark.parametrize(
    ("families", "common"),
    [
        (("sd-1", "lcm"), {"text_encoder", "vae_decoder", "vae_encoder"}),
        (("sd-1", "instruct-pix2pix"), {"text_encoder", "vae_decoder"}),
        (("flux1-dev", "flux1-kontext"), {"text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"}),
        (("flux1-dev", "z-image"), {"vae_decoder", "vae_encoder"}),
    ],
)
def test_families_share_the_keys_of_the_modules_that_they_share(
    families: tuple[str, str], common: set[str], checkpoint_of: Callable[[str], Path]
) -> None:
    one, other = (
        {each.name: component_key(checkpoint, each, ContentHashes()) for each in checkpoint.family.components}
        for checkpoint in (open_checkpoint(str(checkpoint_of(family))) for family in families)
    )
    assert {name for name in one if one[name] == other.get(name)} == common


@pytest.mark.parametrize("family", [*FAMILIES, *EDITING_FAMILIES, *MINIATURES])
def test_graphs_and_their_examples_follow_from_the_sizes_in_the_key(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    axes = {"batch": 2, "height": 6, "width": 4, "text_tokens": 40, "reference_tokens": 3}
    for component in with_deep_cache(checkpoint.family.components):
        ours, theirs = (
            example_inputs(component, sizes, **axes)
            for sizes in (component.sizes_of(checkpoint.sizes), checkpoint.sizes)
        )
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_another_vocabulary_changes_the_tokenizers_key_alone(checkpoint_copy: Path) -> None:
    before = keys(checkpoint_copy)
    with (checkpoint_copy / "tokenizer" / "merges.txt").open("a") as merges:
        merges.write("q q\n")
    assert changed(before, keys(checkpoint_copy)) == {"tokenizer"}


def test_a_key_depends_on_the_content_of_cached_weights_and_not_on_the_blobs_name(checkpoint_copy: Path) -> None:
    """Whoever saves into a snapshot writes through its links: the blob's name then is the hash of other weights."""
    weights = checkpoint_copy / "unet" / "diffusion_pytorch_model.safetensors"
    blob = checkpoint_copy / "blobs" / "abc123"
    blob.parent.mkdir()
    before = keys(checkpoint_copy)
    shutil.move(weights, blob)
    weights.symlink_to(blob)
    assert changed(before, keys(checkpoint_copy)) == set()
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert changed(before, keys(checkpoint_copy)) == {"unet"}


def test_a_plans_key_depends_on_its_onnx_and_its_build_inputs() -> None:
    key = plan_key("onnx", "float16", "TensorRT 11.1", "H100", [(1, 2)])
    assert plan_key("onnx", "float16", "TensorRT 11.1", "H100", [(1, 2)]) == key
    others = [
        plan_key("other", "float16", "TensorRT 11.1", "H100", [(1, 2)]),
        plan_key("onnx", "float32", "TensorRT 11.1", "H100", [(1, 2)]),
        plan_key("onnx", "float16", "TensorRT 11.2", "H100", [(1, 2)]),
        plan_key("onnx", "float16", "TensorRT 11.1", "A10", [(1, 2)]),
        plan_key("onnx", "float16", "TensorRT 11.1", "H100", [(1, 4)]),
    ]
    assert len({key, *others}) == 6


def test_a_repositorys_key_depends_on_parts_settings_and_sources(tmp_path: Path, checkpoint: Checkpoint) -> None:
    source = tmp_path / "model.py"
    source.write_text("one")
    parts = [component_key(checkpoint, component, ContentHashes()) for component in COMPONENTS.values()]
    key = repository_key(parts, {"dtype": "float32"}, [source])
    assert repository_key(parts, {"dtype": "float32"}, [source]) == key
    assert repository_key(parts[1:], {"dtype": "float32"}, [source]) != key
    assert repository_key(parts, {"dtype": "bfloat16"}, [source]) != key
    source.write_text("two")
    assert repository_key(parts, {"dtype": "float32"}, [source]) != key


def test_a_merged_loras_content_and_scale_are_in_the_key(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "c.safetensors").write_bytes(b"one")

    def key(file: str, scale: float) -> str:
        lora = Lora(name="ink", file=tmp_path / file, scale=scale)
        return component_key(checkpoint, COMPONENTS["unet"].with_lora(lora), ContentHashes())

    given = [key("a.safetensors", 1), key("b.safetensors", 1), key("a.safetensors", 0.5)]
    assert len({component_key(checkpoint, COMPONENTS["unet"], ContentHashes()), *given}) == 4
    assert key("c.safetensors", 1) == given[0], "where the file lies is all the same"


def test_content_name_and_scale_of_loras_in_the_pool_are_in_the_repositorys_key(
    checkpoint: Checkpoint, checkpoint_folder: Path, tmp_path: Path
) -> None:
    one, other = (
        save_by_diffusers(tmp_path / str(seed), lora_weights(checkpoint_folder, "unet", seed=seed)) for seed in (1, 2)
    )

    def task(*texts: str) -> ExportTask:
        request = ExportRequest(model=str(checkpoint_folder), output=tmp_path / "out", loras=read_loras(texts))
        return ExportTask(checkpoint, request, PreviousExport(tmp_path / "out", {}), (), None)

    tasks = [task(f"ink={one}"), task(f"ink={other}"), task(f"clay={one}"), task(f"ink={one}:0.5")]
    assert len({each.key for each in tasks}) == 4
    assert len({str(each.keys) for each in tasks}) == 1, "no component is converted again"


def test_a_plan_with_a_pool_depends_on_the_loras_and_on_what_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")

    def key(file: str, first: int) -> str:
        return plan_key("onnx", *pool_parts([Placement(Lora(name="ink", file=tmp_path / file), (first,))]))

    given = {key("a.safetensors", 0), key("b.safetensors", 0), key("a.safetensors", 4)}
    monkeypatch.setattr(cache_key, "_contents", lambda paths: sorted(path.name for path in paths))
    names = str(pool_parts([]))
    assert len(given) == 3
    assert all(name in names for name in ("lora.py", "lora_changes.py", "layer_names.py"))


def test_a_component_with_a_pool_depends_on_what_names_its_layers_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = COMPONENTS["unet"].with_pool(LoraPool.of_columns(4, kernels=False))
    read: set[str] = set()

    def contents(paths: Iterable[Path]) -> list[str]:
        names = {path.name for path in paths}
        read.update(names)
        return sorted(names)

    monkeypatch.setattr(cache_key, "_contents", contents)
    component_key(checkpoint, component, ContentHashes())
    assert {"layer_paths.py", "layer_names.py", "transformer_names.py"} <= read
    assert "lora.py" not in read


@pytest.mark.parametrize("engine", ["openvino", "tensorrt"])
def test_an_int8_unet_depends_on_all_that_its_calls_do(engine: str, tmp_path: Path) -> None:
    target = Target(library="tensorrt", version="10.3", gpu="A10", compute_capability="8.6")

    def key(folder: Path) -> str:
        request = ExportRequest(model=str(folder), output=tmp_path / "out", engine=engine, dtype="int8")
        previous, built = PreviousExport(request.output, {}), target if engine == "tensorrt" else None
        task = ExportTask(open_checkpoint(str(folder)), request, previous, ((64, 64),) if built else (), built)
        return task.keys["unet"]

    painter = save_miniature(tmp_path / "painter", family="sdxl", scheduler={"timestep_spacing": "trailing"})
    moved, turbo = (Path(shutil.copytree(painter, tmp_path / name)) for name in ("moved", "painter-turbo"))
    before = key(painter)
    assert before == key(moved)
    assert before != key(turbo), "four steps without guidance, by its name"
    edit_json(painter / "tokenizer" / "tokenizer_config.json", pad_token="!")
    assert key(painter) != before
