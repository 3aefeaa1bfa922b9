"""Admission control."""

from __future__ import annotations

import asyncio
import statistics

import pytest

from hypergen_gateway.errors import DeadlineTooShortError, QueueFullError
from hypergen_gateway.generation.admission import Admission
from hypergen_gateway.generation.latency import Work
from support.fake_backend import until


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Visitor:
    """A task that is admitted and stays until it is told to go."""

    def __init__(
        self, admission: Admission, name: str = "", log: list[str] | None = None, images: int = 1, capacity: int = 2
    ) -> None:
        self.is_in = False
        self.done = asyncio.Event()
        self.slot = admission.enter(ask(images), capacity)
        self.task = asyncio.create_task(self._visit(admission, name, [] if log is None else log))

    async def _visit(self, admission: Admission, name: str, log: list[str]) -> None:
        async with admission.acquire(self.slot):
            log.append(name)
            self.is_in = True
            await self.done.wait()

    async def leave(self) -> None:
        self.done.set()
        await self.task


def ask(images: int = 1, steps: float = 10, load: float = 1.0, nbytes: int = 0) -> Work:
    return Work(images=images, steps=steps, load=load, nbytes=nbytes)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def play(visitors: list[Visitor], clock: Clock) -> list[float]:
    """A sampler that works on all who are let in; gives the seconds that each visitor took."""
    began, steps = clock.now, dict.fromkeys(visitors, 0)
    ended: dict[Visitor, float] = {}
    while len(ended) < len(visitors):
        await settle()
        working = [visitor for visitor in visitors if visitor.is_in and visitor not in ended]
        clock.now += 0.02 + 0.005 * sum(visitor.slot.images for visitor in working)
        for visitor in working:
            steps[visitor] += 1
            if steps[visitor] == visitor.slot.work.steps:
                ended[visitor] = clock.now - began
                await visitor.leave()
    return [ended[visitor] for visitor in visitors]


async def measured(clock: Clock, seconds: float = 1.0, max_waiting: int = 10) -> Admission:
    """An admission that has measured one image of ten steps, which took `seconds`."""
    admission = Admission(max_waiting, clock)
    visitor = Visitor(admission)
    await settle()
    clock.now += seconds
    await visitor.leave()
    return admission


class TestTurns:
    async def test_images_beyond_the_capacity_wait_and_come_in_order_of_arrival(self) -> None:
        admission, log = Admission(10), list[str]()
        visitors = [Visitor(admission, name, log) for name in "abcd"]
        await settle()
        assert (log, admission.waiting, admission.running) == (["a", "b"], 2, 2)
        assert [visitor.slot.position for visitor in visitors] == [0, 0, 1, 2]
        await visitors[1].leave()
        await settle()
        assert (log, admission.waiting) == (["a", "b", "c"], 1)
        for visitor in visitors:
            await visitor.leave()
        assert (log, admission.waiting, admission.running_images) == (["a", "b", "c", "d"], 0, 0)

    async def test_a_small_request_does_not_overtake_a_large_one(self) -> None:
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

    async def test_a_request_larger_than_the_capacity_gets_all_of_it(self) -> None:
        admission, log = Admission(10), list[str]()
        await Visitor(admission, "huge", log, images=10).leave()
        assert log == ["huge"]

    async def test_a_request_that_leaves_the_queue_lets_the_next_ones_move_up(self) -> None:
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

    async def test_a_slot_given_to_a_request_that_leaves_at_that_moment_is_not_lost(self) -> None:
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

    async def test_a_failure_releases_the_slot(self) -> None:
        admission = Admission(0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with admission.acquire(admission.enter(ask(), 1)):
                    raise ZeroDivisionError
        assert admission.running == 0


class TestMemoryOfTheQueue:
    async def test_images_that_wait_take_no_more_memory_than_they_may(self) -> None:
        admission = Admission(100, max_waiting_bytes=1000)
        working = Visitor(admission, images=2)
        waiting = [admission.enter(ask(nbytes=nbytes), 2) for nbytes in (600, 400, 0)]
        with pytest.raises(QueueFullError):
            admission.enter(ask(nbytes=1), 2)
        assert admission.waiting == len(waiting)
        await working.leave()

    async def test_what_takes_more_than_that_waits_alone(self) -> None:
        admission = Admission(100, max_waiting_bytes=1000)
        working = Visitor(admission, images=2)
        admission.enter(ask(nbytes=5000), 2)
        admission.enter(ask(nbytes=0), 2)
        with pytest.raises(QueueFullError):
            admission.enter(ask(nbytes=1), 2)
        await working.leave()


class TestFullQueues:
    async def test_a_full_queue_refuses_at_once_and_names_a_wait_even_without_a_measurement(self) -> None:
        admission = Admission(1)
        visitors = [Visitor(admission, images=2) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            admission.enter(ask(), 2)
        assert refused.value.headers == {"Retry-After": "1", "retry-after-ms": "1000"}
        for visitor in visitors:
            await visitor.leave()

    async def test_the_named_wait_is_what_is_left_of_the_work_before(self) -> None:
        clock = Clock()
        admission = await measured(clock, max_waiting=1)  # 0.1 s per image and step
        visitors = [Visitor(admission, images=2) for _ in range(2)]  # 20 image-steps each: 2 s
        clock.now += 0.5
        with pytest.raises(QueueFullError) as refused:
            admission.enter(ask(), 2)
        assert refused.value.retry_after == pytest.approx(1.5)
        assert refused.value.headers["retry-after-ms"] == "1500"
        for visitor in visitors:
            await visitor.leave()

    async def test_without_a_queue_the_wait_is_until_a_slot_is_free(self) -> None:
        clock = Clock()
        admission = await measured(clock, max_waiting=0)
        working = Visitor(admission, images=2)
        with pytest.raises(QueueFullError) as refused:
            admission.enter(ask(), 2)
        assert refused.value.retry_after == pytest.approx(2.0)
        await working.leave()

    async def test_a_wait_that_openai_s_clients_would_not_keep_is_shortened(self) -> None:
        clock = Clock()
        admission = await measured(clock, seconds=500, max_waiting=0)
        working = Visitor(admission)
        with pytest.raises(QueueFullError) as refused:
            admission.enter(ask(), 1)
        assert refused.value.retry_after == 120.0
        await working.leave()


class TestEstimates:
    async def test_nothing_is_estimated_before_a_request_was_measured(self) -> None:
        admission = Admission(10)
        visitor = Visitor(admission)
        assert visitor.slot.estimate is None
        await visitor.leave()

    async def test_an_estimate_grows_with_images_steps_and_load_and_with_who_is_before(self) -> None:
        admission = await measured(Clock())
        estimates = [
            admission.enter(work, 100).estimate
            for work in (ask(), ask(images=2), ask(steps=40), ask(load=4.0))  # all of them stay
        ]
        # Each is played together with those before: 10 steps of 1 image, then of 3, then 10 of 4 and 30 of 1, …
        assert estimates == pytest.approx([1.0, 3.0, 4 + 3.0, 8 + 0.0])

    async def test_the_time_that_passed_is_taken_off(self) -> None:
        clock = Clock()
        admission = await measured(clock)
        working = Visitor(admission, capacity=1)
        clock.now += 0.75
        waiting = Visitor(admission, capacity=1)
        assert waiting.slot.estimate == pytest.approx(0.25 + 1.0)
        assert admission.remaining_rounds(working.slot) == pytest.approx(2.5)
        assert admission.remaining_rounds(waiting.slot) == 10
        await working.leave()
        await waiting.leave()

    async def test_estimates_hold_in_a_played_queue(self) -> None:
        """Requests of one to three images, whose rounds take 20 ms and 5 ms per image: what was said comes true."""
        clock, ratios = Clock(), list[float]()
        admission = Admission(100, clock)
        for turn in range(12):
            visitors = [Visitor(admission, images=1 + (turn + number) % 3, capacity=4) for number in range(8)]
            taken = await play(visitors, clock)
            if turn > 2:
                ratios += [
                    seconds / (visitor.slot.estimate or 0) for visitor, seconds in zip(visitors, taken, strict=True)
                ]
        assert len(ratios) == 72
        assert 0.95 < statistics.median(ratios) < 1.05
        assert sum(0.8 < ratio < 1.2 for ratio in ratios) >= 65


class TestDeadlines:
    async def test_what_can_be_met_is_let_in_and_what_nobody_knows_too(self) -> None:
        assert Admission(10).enter(ask(), 2, deadline=0.001).position == 0
        admission = await measured(Clock())
        assert admission.enter(ask(), 2, deadline=1.01).estimate == pytest.approx(1.0)

    async def test_what_comes_too_late_behind_others_is_refused_until_enough_of_them_is_done(self) -> None:
        admission = await measured(Clock())
        working = Visitor(admission, images=2)
        with pytest.raises(DeadlineTooShortError, match="about 3 s, and the request allows") as refused:
            admission.enter(ask(), 2, deadline=1.5)
        assert refused.value.retry_after == pytest.approx(1.5)
        assert refused.value.headers == {"Retry-After": "2", "retry-after-ms": "1500"}
        assert admission.waiting == 0
        await working.leave()

    async def test_what_not_even_an_idle_server_can_do_is_not_to_be_tried_again(self) -> None:
        admission = await measured(Clock())
        with pytest.raises(DeadlineTooShortError, match="even on an idle server") as refused:
            admission.enter(ask(steps=100), 2, deadline=5)
        assert (refused.value.status, refused.value.headers) == (429, {"x-should-retry": "false"})

    async def test_old_figures_forbid_nothing_on_an_idle_server(self) -> None:
        """A first request on cold engines is slow; nobody may be shut out by it for good."""
        clock = Clock()
        admission = await measured(clock, seconds=60)
        with pytest.raises(DeadlineTooShortError):
            admission.enter(ask(), 2, deadline=5)
        clock.now += 61
        assert admission.enter(ask(), 2, deadline=5).position == 0
