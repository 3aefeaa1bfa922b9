"""The settings, and those that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hypergen_gateway.config import Config


def test_the_defaults_are_an_open_server_with_hypergen_s_queue() -> None:
    config = Config()
    assert config.api_key is None
    assert config.max_queue_size == 100


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_refused_rather_than_taken_for_none(key: str) -> None:
    with pytest.raises(ValueError, match="invalid API key: it is empty"):
        Config(api_key=key)


def test_numbers_that_would_stop_everything_are_refused() -> None:
    with pytest.raises(ValueError, match="request_timeout"):
        Config(request_timeout=0)
    with pytest.raises(ValueError, match="max_queue_size"):
        Config(max_queue_size=-1)


def test_neither_key_nor_secret_is_in_the_repr() -> None:
    assert "hunter2" not in repr(Config(api_key="hunter2", link_secret="hunter2-hunter2-hunter2"))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("public_url", "images.example.com", "public URL"),
        ("public_url", "ftp://images.example.com", "public URL"),
        ("public_url", "https://images.example.com/?a=b", "public URL"),
        ("link_bucket", "images", "s3://BUCKET"),
        ("link_bucket", "s3://", "s3://BUCKET"),
        ("link_secret", "short", "16 characters"),
        ("link_lifetime", 0, "link_lifetime"),
        ("heartbeat_interval", 0, "heartbeat_interval"),
        ("request_timeout", math.nan, "request_timeout"),
        ("request_timeout", math.inf, "request_timeout"),
        ("request_timeout", 1e12, "request_timeout"),
        ("body_timeout", math.nan, "body_timeout"),
        ("model_aliases", ("gpt-image-1", "/"), "alias"),
        ("keep_alive", math.nan, "keep_alive"),
        ("keep_alive", math.inf, "keep_alive"),
        ("keep_alive", 0, "keep_alive"),
        ("keep_alive", -1, "keep_alive"),
        ("retry_grace", math.inf, "retry_grace"),
        ("link_lifetime", math.inf, "link_lifetime"),
        ("link_lifetime", 1e10, "link_lifetime"),
        ("max_queue_size", 10**400, "max_queue_size"),
    ],
)
def test_settings_of_links_and_streams_that_cannot_work_are_refused(setting: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**{setting: value})


def test_links_into_a_bucket_last_as_long_as_a_signature_may() -> None:
    assert Config(link_bucket="s3://images", link_lifetime=604_800).link_lifetime == 604_800
    with pytest.raises(ValueError, match="seven days"):
        Config(link_bucket="s3://images", link_lifetime=604_801)
