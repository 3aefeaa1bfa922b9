"""Which ids are taken from clients."""

from __future__ import annotations

import logging

import pytest

from hypergen_gateway.request_id import RequestIdFilter, accept_or_create, current_request_id


@pytest.mark.parametrize("sane", ["a", "req_123", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "x" * 128])
def test_a_sane_id_is_kept(sane: str) -> None:
    assert accept_or_create(sane) == sane


@pytest.mark.parametrize("candidate", [None, "", "a b", "a\nb", "x" * 129, "é", "<script>", "a\n"])
def test_any_other_id_is_replaced_by_a_new_one(candidate: str | None) -> None:
    created = accept_or_create(candidate)
    assert created.startswith("req_")
    assert created != accept_or_create(candidate)


def test_log_records_carry_the_id_of_the_request_or_a_dash() -> None:
    def logged_id() -> str:
        record = logging.LogRecord("name", logging.INFO, "path", 1, "message", None, None)
        assert RequestIdFilter().filter(record)
        return str(record.__dict__["request_id"])

    assert logged_id() == "-"
    token = current_request_id.set("req_1")
    assert logged_id() == "req_1"
    current_request_id.reset(token)
