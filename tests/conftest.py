"""What several folders of tests share: miniature checkpoints and their one export each, which takes a while."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypergen_gateway.repository import ExportOptions, find_repository
from miniature import save_miniature


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(tmp_path_factory.mktemp("checkpoint") / "miniature")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def exported(checkpoint: Path, cache_dir: Path) -> Path:
    """The miniature's repository in float32, where `hypergen serve` finds it."""
    return _export(checkpoint, cache_dir)


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Callable[[str], tuple[Path, Path]]:
    """A family's miniature and its repository, made as `exported` is."""

    @functools.cache
    def make(family: str) -> tuple[Path, Path]:
        folder = save_miniature(tmp_path_factory.mktemp("family") / family, family=family)
        return folder, _export(folder, cache_dir)

    return make


def _export(checkpoint: Path, cache_dir: Path) -> Path:
    options = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=cache_dir)
    return asyncio.run(find_repository(str(checkpoint), options))


@pytest.fixture(scope="session")
def pipeline(checkpoint: Path) -> Any:
    """diffusers' own pipeline of the checkpoint; whoever uses it sets its scheduler."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
