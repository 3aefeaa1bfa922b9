"""A gateway whose backend is a fake, for every test here."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(Config(), backend)) as client:
        yield client
