"""Markers for slow tests, mostly by the programs that they start; `pytest --quick` leaves them out.

Most markers follow from a fixture or from the test's path; a test that starts Chromium or Java itself is marked
explicitly.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

KINDS: Mapping[str, str] = {
    "triton": "starts a Triton",
    "browser": "drives Chromium",
    "node": "installs and runs packages of npm",
    "java": "runs a JDK",
    "export": "exports a checkpoint, or converts a component of one",
    "slow": "takes seconds by itself, as it generates requests or imports much",
    "torch": "runs or trains a miniature in torch",
}
BY_FIXTURE: Mapping[str, str] = {
    "checkpoint_of": "torch",
    "converted": "export",
    "family_of": "export",
    "node": "node",
    "shipped_repository": "export",
}
BY_PLACE: Mapping[str, str] = {
    "end_to_end": "triton",
    "export/conversion": "export",
    "export/emoji": "torch",
    "export/emoji_flow": "torch",
    "export/engines/test_tensorrt.py": "export",
    "export/repository/test_export.py": "export",
    "export/single_files": "torch",
    "gateway/api/test_fuzz.py": "slow",
    "gateway/api/test_schemathesis.py": "slow",
    "gateway/clients/test_litellm.py": "slow",
    "gateway/embedded/test_compilations.py": "triton",
    "gateway/embedded/test_server.py": "triton",
    "gateway/embedded/test_surroundings.py": "triton",
    "test_families.py": "torch",
    "test_latent_scale.py": "torch",
    "test_long_prompts.py": "torch",
    "test_prompt_weights.py": "torch",
    "test_schedulers.py": "torch",
    "test_textual_inversion.py": "torch",
    "test_transformers.py": "torch",
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROGRAMS: Mapping[str, str | None] = {"browser": CHROMIUM, "java": shutil.which("javac")}


def register_kinds(config: pytest.Config) -> None:
    """Make the markers known, as `--strict-markers` wants it."""
    for kind, meaning in KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {meaning}")


def mark_kinds(items: list[pytest.Item]) -> None:
    """Mark each test with what it starts, and skip it if that program is missing."""
    for item in items:
        for kind in kinds_of(item):
            item.add_marker(kind)
        for kind, program in PROGRAMS.items():
            if program is None and item.get_closest_marker(kind):
                item.add_marker(pytest.mark.skip(reason=f"the program is missing: it {KINDS[kind]}"))


def leave_kinds_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that have no kind and need no GPU."""
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        (left if any(map(item.get_closest_marker, (*KINDS, "gpu"))) else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def kinds_of(item: pytest.Item) -> Iterator[str]:
    """What follows from the fixtures and the place of a test."""
    yield from kinds_of_place(item.path)
    yield from (kind for fixture, kind in BY_FIXTURE.items() if fixture in getattr(item, "fixturenames", ()))


@functools.cache
def kinds_of_place(path: Path) -> tuple[str, ...]:
    """What follows from the place of a test, or of a folder of them. Kept, as many tests share a file."""
    return tuple(kind for place, kind in BY_PLACE.items() if path.is_relative_to(TESTS / place))
