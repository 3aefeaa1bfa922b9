"""What stays on the event loop and what leaves it."""

from __future__ import annotations

import threading

import pytest

from hypergen_gateway.threads import off_the_loop


@pytest.mark.parametrize(("nbytes", "stays"), [(0, True), (1024, True), (1025, False)])
async def test_work_leaves_the_loop_where_its_data_are_more_than_is_quick(nbytes: int, stays: bool) -> None:
    thread = await off_the_loop(threading.get_ident, nbytes, quick=1024)
    assert (thread == threading.get_ident()) is stays


@pytest.mark.parametrize("nbytes", [0, 2])
async def test_what_the_work_raises_is_raised_from_either(nbytes: int) -> None:
    def fail() -> None:
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        await off_the_loop(fail, nbytes, quick=1)
