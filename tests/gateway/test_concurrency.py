"""Time limits and cancellation, and what stays on the event loop and what leaves it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading

import pytest

from hypergen_gateway.concurrency import ByteBudget, cancel, run_in_thread_if_large, run_with_timeout


class TestRunWithTimeout:
    async def test_the_result_and_the_error_of_the_work_are_its_own(self) -> None:
        async def fail() -> None:
            raise ValueError("no image")

        assert await run_with_timeout(asyncio.sleep(0, "an image"), 60) == "an image"
        with pytest.raises(ValueError, match="no image"):
            await run_with_timeout(fail(), 60)

    @pytest.mark.parametrize("seconds", [-1, 0, 0.01])
    async def test_work_that_takes_longer_is_cancelled(self, seconds: float) -> None:
        work = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await run_with_timeout(work, seconds)
        assert work.cancelled()

    @pytest.mark.parametrize("turns", range(4))
    @pytest.mark.parametrize("ending", ["result", "error", "timeout"])
    async def test_whoever_is_cancelled_as_the_work_ends_is_cancelled(self, ending: str, turns: int) -> None:
        """`turns` of the event loop after the end: whatever of it has been noticed by then."""
        work = asyncio.get_running_loop().create_future()

        async def wait_for_ever() -> None:
            while True:
                with contextlib.suppress(TimeoutError, ValueError):
                    await run_with_timeout(asyncio.shield(work), 0 if ending == "timeout" else 60)
                await asyncio.sleep(3600)

        waiting = asyncio.create_task(wait_for_ever())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if ending == "result":
            work.set_result(None)
        elif ending == "error":
            work.set_exception(ValueError("no image"))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=5)
        assert waiting.cancelled()


class TestCancel:
    async def test_a_task_that_does_not_end_is_waited_for_no_longer_than_that(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        may_end = asyncio.Event()

        async def stubborn() -> None:
            while not may_end.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await may_end.wait()

        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await cancel(task, seconds=0.01)
        assert not task.done()
        assert "has not ended within 0.01 s of its cancellation" in caplog.text
        assert "stubborn" in caplog.text
        may_end.set()
        await asyncio.wait([task], timeout=5)

    async def test_a_task_s_error_is_dropped_without_a_word(self, caplog: pytest.LogCaptureFixture) -> None:
        async def fail() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                raise ValueError("no image")

        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        await cancel(task)
        del task
        gc.collect()
        assert caplog.text == ""


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
    async def test_a_request_that_leaves_the_queue_holds_nothing(self, called_first: bool) -> None:
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
