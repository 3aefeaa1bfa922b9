"""The gate in front of Triton."""

from __future__ import annotations

import asyncio

import pytest

from fake_backend import until
from hypergen_gateway.admission import Admission
from hypergen_gateway.errors import QueueFullError


class Visitor:
    """A task that is admitted and stays until it is told to go."""

    def __init__(self, admission: Admission, name: str, log: list[str], images: int = 1, capacity: int = 2) -> None:
        self.done = asyncio.Event()
        self.task = asyncio.create_task(self._visit(admission, name, log, images, capacity))

    async def _visit(self, admission: Admission, name: str, log: list[str], images: int, capacity: int) -> None:
        async with admission.admit(images, capacity):
            log.append(name)
            await self.done.wait()

    async def leave(self) -> None:
        self.done.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_images_beyond_the_capacity_wait_and_come_in_order_of_arrival() -> None:
    admission, log = Admission(10), list[str]()
    visitors = [Visitor(admission, name, log) for name in "abcd"]
    await settle()
    assert (log, admission.waiting) == (["a", "b"], 2)
    await visitors[1].leave()
    await settle()
    assert (log, admission.waiting) == (["a", "b", "c"], 1)
    for visitor in visitors:
        await visitor.leave()
    assert (log, admission.waiting) == (["a", "b", "c", "d"], 0)


async def test_a_small_request_does_not_overtake_a_large_one() -> None:
    admission, log = Admission(10), list[str]()
    first = Visitor(admission, "first", log)
    large = Visitor(admission, "large", log, images=2)
    small = Visitor(admission, "small", log)
    await settle()
    assert log == ["first"]
    await first.leave()
    await settle()
    assert log == ["first", "large"]
    await large.leave()
    await small.leave()


async def test_a_request_larger_than_the_capacity_gets_all_of_it() -> None:
    admission, log = Admission(10), list[str]()
    await Visitor(admission, "huge", log, images=10).leave()
    assert log == ["huge"]


async def test_a_full_queue_refuses_at_once_and_names_a_wait() -> None:
    admission, log = Admission(1), list[str]()
    visitors = [Visitor(admission, name, log, images=2) for name in "ab"]
    await settle()
    with pytest.raises(QueueFullError) as refused:
        async with admission.admit(1, 2):
            pass
    assert refused.value.retry_after == 1.0
    for visitor in visitors:
        await visitor.leave()


async def test_the_named_wait_follows_the_measured_time_of_a_request() -> None:
    admission, log = Admission(0), list[str]()
    measured = Visitor(admission, "measured", log, images=2)
    await asyncio.sleep(0.3)
    await measured.leave()
    running = [Visitor(admission, "running", log) for _ in range(2)]
    await settle()
    with pytest.raises(QueueFullError) as refused:
        async with admission.admit(1, 2):
            pass
    assert 0.15 <= refused.value.retry_after < 0.3
    for visitor in running:
        await visitor.leave()


async def test_who_leaves_the_queue_frees_the_place_for_those_behind() -> None:
    admission, log = Admission(10), list[str]()
    first = Visitor(admission, "first", log)
    large = Visitor(admission, "large", log, images=2)
    small = Visitor(admission, "small", log)
    await settle()
    large.task.cancel()
    await until(lambda: log == ["first", "small"])
    assert admission.waiting == 0
    await first.leave()
    await small.leave()


async def test_a_place_given_to_a_request_that_leaves_in_that_moment_is_not_lost() -> None:
    admission, log = Admission(10), list[str]()
    first = Visitor(admission, "first", log, capacity=1)
    second = Visitor(admission, "second", log, capacity=1)
    third = Visitor(admission, "third", log, capacity=1)
    await settle()
    first.done.set()
    await asyncio.sleep(0)  # first leaves: second is called, and has not run yet
    second.task.cancel()
    await until(lambda: "third" in log)
    assert "second" not in log
    await third.leave()


async def test_a_failure_inside_gives_the_place_back() -> None:
    admission = Admission(0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with admission.admit(1, 1):
                raise ZeroDivisionError
