"""Which ids are taken from clients."""

from __future__ import annotations

import pytest

from hypergen_gateway.http.request_id import accept_or_create


@pytest.mark.parametrize("sane", ["a", "req_123", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "x" * 128])
def test_a_sane_id_is_kept(sane: str) -> None:
    assert accept_or_create(sane) == sane


@pytest.mark.parametrize("candidate", [None, "", "a b", "a\nb", "x" * 129, "é", "<script>", "a\n"])
def test_any_other_id_is_replaced_by_a_new_one(candidate: str | None) -> None:
    created = accept_or_create(candidate)
    assert created.startswith("req_")
    assert created != accept_or_create(candidate)
