"""Fixtures shared by several test folders: miniature checkpoints, and one slow export of each.

Tests run in several processes, which share what one of them has created under `shared`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hypergen_gateway.embedded.export_cache import SHIPPED_MODEL, ExportOptions, find_repository
from support.claims import ClaimsTable, attach_claims
from support.faults import FaultsTable
from support.images_table import ImagesTable
from support.kinds import kinds_of_place, leave_kinds_out, mark_kinds, register_kinds
from support.node_client import install_node_client
from support.order import sort_by_length
from support.skips import SkipsFail, SkipsTable

# Families that are exported and served with a shallow UNet: one with attention in it, and one without.
DEEP_CACHED = ("lcm", "sdxl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests without a kind: see tests/support/kinds.py")
    parser.addoption("--faults", action="store_true", help="what the tests of faults saw, as a table")
    parser.addoption("--images", action="store_true", help="build and run the container images, too")
    parser.addoption("--claims", action="store_true", help="which claims about production the tests have proved")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no test that would be left out."""
    return True if config.getoption("--quick") and any(kinds_of_place(collection_path)) else None


def pytest_configure(config: pytest.Config) -> None:
    register_kinds(config)
    if os.environ.get("CI"):
        config.pluginmanager.register(SkipsFail(), "skips-fail")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipsTable(), "skips")
    # Tests may run in several processes; the one that waits for them hears of all.
    if config.getoption("--claims") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ClaimsTable(config.getoption("--images")), "claims")
    if config.getoption("--images") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ImagesTable(), "images")
    if config.getoption("--faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultsTable(), "faults")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage in what is imported, then or later: that takes each process seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Before pytest looks at the markers that were asked for.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_kinds(items)
    if config.getoption("--quick"):
        leave_kinds_out(config, items)
    attach_claims(items)
    if "PYTEST_XDIST_WORKER" in os.environ:
        sort_by_length(items)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all its processes see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def node() -> Path:
    """A folder with OpenAI's Node client and Vercel's AI SDK."""
    return install_node_client()


@pytest.fixture(scope="session")
def checkpoint_of(shared: Path) -> Callable[[str], Path]:
    """A family's miniature."""
    return functools.partial(_made_once, shared)


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("sd-1")


@pytest.fixture(scope="session")
def cache_dir(shared: Path) -> Path:
    return shared / "cache"


@pytest.fixture(scope="session")
def family_of(checkpoint_of: Callable[[str], Path], cache_dir: Path) -> Callable[[str], tuple[Path, Path]]:
    """A family's miniature and its repository in float32, where `hypergen serve` finds it."""

    @functools.cache
    def make(family: str) -> tuple[Path, Path]:
        folder = checkpoint_of(family)
        return folder, _export(str(folder), cache_dir)

    return make


@pytest.fixture(scope="session")
def exported(family_of: Callable[[str], tuple[Path, Path]]) -> Path:
    """The miniature's repository in float32, where `hypergen serve` finds it."""
    return family_of("sd-1")[1]


@pytest.fixture(scope="session")
def shipped_repository(cache_dir: Path) -> Path:
    """The repository of the model that ships with the project; `hypergen serve` takes its components from there."""
    return _export(SHIPPED_MODEL, cache_dir)


def _made_once(shared: Path, family: str) -> Path:
    # They import torch, without which the gateway's tests run.
    from support.miniature import save_miniature
    from support.transformer_miniatures import MINIATURES, save_transformer_miniature, state_small_default

    folder = shared / "checkpoints" / family
    with FileLock(shared / f"{family}.lock"):
        if folder.exists():
            return folder
        if family in MINIATURES:
            return state_small_default(save_transformer_miniature(folder, family))
        return save_miniature(folder, family=family)


def _export(model: str, cache_dir: Path) -> Path:
    name = Path(model).name
    options = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=cache_dir, deep_cache=name in DEEP_CACHED)
    # Whoever comes second finds it up to date.
    with FileLock(cache_dir.with_name(f"{name}.export.lock")):
        return asyncio.run(find_repository(model, options))


@pytest.fixture(scope="session")
def pipeline(checkpoint: Path) -> Any:
    """diffusers' own pipeline of the checkpoint; whoever uses it sets its scheduler."""
    from support.pipelines import pipeline_of

    return pipeline_of(checkpoint)
