"""What stays on the event loop and what leaves it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hypergen_gateway.concurrency import ByteBudget, run_in_thread_if_large


@pytest.mark.parametrize(("nbytes", "stays"), [(0, True), (1024, True), (1025, False)])
async def test_work_leaves_the_loop_where_its_data_are_more_than_is_quick(nbytes: int, stays: bool) -> None:
    thread = await run_in_thread_if_large(threading.get_ident, nbytes, quick=1024)
    assert (thread == threading.get_ident()) is stays


@pytest.mark.parametrize("nbytes", [0, 2])
async def test_what_the_work_raises_is_raised_from_either(nbytes: int) -> None:
    def fail() -> None:
        raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        await run_in_thread_if_large(fail, nbytes, quick=1)


class TestByteBudget:
    async def test_what_has_no_room_waits_in_order_of_arrival_even_if_it_would_fit(self) -> None:
        budget, done = ByteBudget(100), list[int]()

        async def work(nbytes: int) -> None:
            await budget.acquire(nbytes)
            done.append(nbytes)

        await asyncio.wait_for(work(60), 1)
        waiting = [asyncio.ensure_future(work(nbytes)) for nbytes in (50, 30, 90)]
        await asyncio.sleep(0)
        assert done == [60]
        budget.release(60)
        await asyncio.wait_for(asyncio.gather(*waiting[:2]), 1)
        assert done == [60, 50, 30]
        budget.release(50)
        await asyncio.sleep(0)
        assert not waiting[2].done()
        budget.release(30)
        await asyncio.wait_for(waiting[2], 1)

    async def test_more_than_all_of_it_goes_alone(self) -> None:
        budget = ByteBudget(100)
        await asyncio.wait_for(budget.acquire(500), 1)
        other = asyncio.ensure_future(budget.acquire(1))
        await asyncio.sleep(0)
        assert not other.done()
        budget.release(500)
        await asyncio.wait_for(other, 1)

    @pytest.mark.parametrize("called_first", [False, True])
    async def test_who_leaves_the_queue_holds_nothing(self, called_first: bool) -> None:
        budget = ByteBudget(100)
        await budget.acquire(80)
        leaving, staying = (asyncio.ensure_future(budget.acquire(nbytes)) for nbytes in (90, 100))
        await asyncio.sleep(0)
        if called_first:
            budget.release(80)
        leaving.cancel()
        await asyncio.wait([leaving])
        if not called_first:
            budget.release(80)
        await asyncio.wait_for(staying, 1)
