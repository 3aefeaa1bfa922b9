"""One server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from support.running_server import Server, start_server, stop_server


@pytest.fixture(scope="session")
def server(checkpoint: Path, exported: Path, cache_dir: Path) -> Iterator[Server]:
    """The miniature in float32, so that its images can be held against diffusers'."""
    assert exported.parent == cache_dir
    running = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(checkpoint))
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened
