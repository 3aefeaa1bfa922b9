"""The settings, and those that are refused."""

from __future__ import annotations

import pytest

from hypergen_gateway.config import Config


def test_the_defaults_are_an_open_server_with_hypergen_s_queue() -> None:
    config = Config()
    assert config.api_key is None
    assert config.max_queue_size == 100


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_refused_rather_than_taken_for_none(key: str) -> None:
    with pytest.raises(ValueError, match="API key is empty"):
        Config(api_key=key)


def test_numbers_that_would_stop_everything_are_refused() -> None:
    with pytest.raises(ValueError, match="request_timeout"):
        Config(request_timeout=0)
    with pytest.raises(ValueError, match="max_queue_size"):
        Config(max_queue_size=-1)


def test_the_key_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(Config(api_key="hunter2"))
