"""LoRAs that are put into a rank pool while it is served: a bad file spoils nothing for others."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.repository.lora_columns import change_columns

RANK = 2


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)


@pytest.fixture
def pool(tmp_path: Path) -> PoolWeights:
    return empty_pool(tmp_path, torch.float32)


def empty_pool(folder: Path, dtype: torch.dtype) -> PoolWeights:
    """The empty pool of a repository."""
    made = PoolWeights(folder / "repository" / "unet" / "1")
    made.folder.mkdir(parents=True)
    made.create("unet", Unet(), LoraPool(rank=8, kernels=False), dtype)
    made.fill([])
    return made


def save(file: Path, layer: str = "one", settings: Mapping[str, Any] | None = None, rank_up: int = RANK) -> Path:
    """A LoRA of one layer; `settings` are peft's, as diffusers stores them."""
    up = torch.ones(4, rank_up)
    weights = {f"unet.{layer}.lora_A.weight": torch.ones(RANK, 4), f"unet.{layer}.lora_B.weight": up}
    stored = {f"unet.{name}": value for name, value in (settings or {}).items()}
    save_file(weights, file, metadata={"lora_adapter_metadata": json.dumps(stored)})
    return file


def without_shapes(file: Path) -> Path:
    header = json.dumps({"unet.one.lora_A.weight": {"dtype": "F32", "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    return file


def add(pool: PoolWeights, *files: Path) -> list[dict[str, Any]]:
    entries = [{"name": file.stem, "file": str(file)} for file in files]
    return change_columns(pool.folder.parents[1], {"free": list(range(8)), "add": entries})


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 1e39])
def test_a_lora_that_is_not_finite_never_reaches_the_pool(alpha: float, pool: PoolWeights, tmp_path: Path) -> None:
    bad, good = save(tmp_path / "bad.safetensors", settings={"lora_alpha": alpha}), save(tmp_path / "good.safetensors")
    rejected, added = add(pool, bad, good)
    assert rejected == {"name": "bad", "error": "bad.safetensors: its weights times alpha are not finite at one"}
    assert (added["name"], added["columns"]) == ("good", [0, 1])
    assert all(tensor.isfinite().all() for tensor in load_file(pool.file).values())


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": "x"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 1}}, None], ids=str
)
def test_a_malformed_file_does_not_keep_others_out(
    settings: Mapping[str, Any] | None, pool: PoolWeights, tmp_path: Path
) -> None:
    file = tmp_path / "bad.safetensors"
    bad = without_shapes(file) if settings is None else save(file, settings=settings)
    rejected, added = add(pool, bad, save(tmp_path / "good.safetensors"))
    assert rejected["error"].startswith(
        ("bad.safetensors: is malformed (", "bad.safetensors: not a safetensors file (")
    )
    assert str(tmp_path) not in rejected["error"]
    assert added == {"name": "good", "rank": RANK, "columns": [0, 1], "changes": ["unet"]}


def test_columns_are_empty_but_for_the_lora_that_has_them(pool: PoolWeights, tmp_path: Path) -> None:
    """The first one was written, but the change was interrupted before it was served."""
    add(pool, save(tmp_path / "a.safetensors", layer="one"))
    add(pool, save(tmp_path / "b.safetensors", layer="two"))
    held = {name for name, tensor in load_file(pool.file).items() if tensor.any()}
    assert held == {"lora_pool.two.down", "lora_pool.two.up"}


def test_factors_of_unequal_ranks_are_refused(pool: PoolWeights, tmp_path: Path) -> None:
    rejected, added = add(pool, save(tmp_path / "bad.safetensors", rank_up=1), save(tmp_path / "good.safetensors"))
    assert "shapes differ" in rejected["error"]
    assert added["columns"] == [0, 1]


def test_a_file_without_room_is_described_and_the_pool_is_left_as_it_is(pool: PoolWeights, tmp_path: Path) -> None:
    before = pool.file.stat()
    request = {"free": [5], "add": [{"name": "a", "file": str(save(tmp_path / "a.safetensors"))}]}
    (answer,) = change_columns(pool.folder.parents[1], request)
    assert answer == {"name": "a", "rank": RANK, "columns": [], "changes": ["unet"]}
    assert pool.file.stat() == before, "the engines would read it again"


def test_a_file_that_does_not_fit_is_refused_without_room_too(pool: PoolWeights, tmp_path: Path) -> None:
    """By its header: weights are not read before there is room."""
    other, wide = save(tmp_path / "other.safetensors", layer="three"), save(tmp_path / "wide.safetensors", rank_up=3)
    entries = [{"name": file.stem, "file": str(file)} for file in (other, wide)]
    answers = change_columns(pool.folder.parents[1], {"free": [5], "add": entries})
    assert [answer["error"] for answer in answers] == [
        "other.safetensors: does not fit this model's unet (it has none of its layers, for example three)",
        "wide.safetensors: does not fit this model's unet (the weights' shapes differ at one)",
    ]


@pytest.mark.parametrize("alpha", [1e6, 1e-6])
def test_a_large_or_small_alpha_keeps_its_product_in_float16(alpha: float, tmp_path: Path) -> None:
    """alpha times the weights would be infinite, and NaN in every image, or zero."""
    pool = empty_pool(tmp_path, torch.float16)
    (added,) = add(pool, save(tmp_path / "a.safetensors", settings={"lora_alpha": alpha}))
    assert added["columns"] == [0, 1]
    tensors = pool.read()
    product = tensors["lora_pool.one.down"] @ tensors["lora_pool.one.up"]
    torch.testing.assert_close(product, torch.full((4, 4), alpha), rtol=2e-3, atol=0)
