"""Admission control: a FIFO queue bounded by images in flight.

Triton applies no backpressure to a decoupled model: it accepts every request at once. So no more images are admitted
than the sampler works on at a time, and the other requests wait here in order of arrival. A request that would wait in
vain is rejected at once: if too many requests are waiting, or if its images would be later than the client's deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hypergen_gateway.errors import DeadlineTooShortError, QueueFullError
from hypergen_gateway.generation.latency import Forecast, RemainingWork, StepTimeModel, Work, forecast

# The SDKs do not wait for a Retry-After above 120 s.
_LONGEST_RETRY_AFTER = 120.0
_SHORTEST_RETRY_AFTER = 0.1
_UNKNOWN_RETRY_AFTER = 1.0
# After this long without a measurement, an idle server admits a request that the old figures would reject.
_TRUSTED_SECONDS = 60.0
# Even a small file may decode, or be resized, to an image of 4096 × 4096: some 64 MiB with its mask.
_WAITING_BYTES = 1 << 30


@dataclass(eq=False)
class Slot:
    """A request that is waiting or running.

    `position` is its position in the queue on arrival, 0 if it started at once. `estimate` is the time in seconds until
    it is done, as expected on arrival: later requests may share the sampler with it.
    `denoising` is the time in seconds that the sampler reports for the request's rounds. It excludes reconnecting and
    encoding text, which are not rounds but would look like one in a request with a single step.
    """

    work: Work
    images: int
    capacity: int
    position: int = 0
    estimate: float | None = None
    denoising: float | None = None
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def rounds(self) -> float:
        """The number of rounds it takes part in; if the slot holds fewer images, some start after others."""
        return self.work.steps * self.work.images / self.images


@dataclass(frozen=True)
class _Entry:
    """When a request started: the time, and the load on the sampler integrated over time until then."""

    seconds: float
    load_seconds: float


class Admission:
    """Admits requests in order of arrival. Bound to one event loop; `clock` returns seconds.

    At most `max_waiting` requests wait, with at most `max_waiting_bytes` of init images between them. A request with
    more bytes than that waits only if no other waiting request has any.
    """

    def __init__(
        self,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_waiting_bytes: int = _WAITING_BYTES,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._clock = clock
        self._step_times = StepTimeModel()
        self._waiting: deque[Slot] = deque()
        self._running: dict[Slot, _Entry] = {}
        self._now = self._measured_at = clock()
        self._load_seconds = 0.0

    @property
    def waiting(self) -> int:
        """The number of requests that are waiting."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of requests that are running."""
        return len(self._running)

    @property
    def running_images(self) -> int:
        """The number of images that are running."""
        return sum(slot.images for slot in self._running)

    def enter(self, work: Work, capacity: int, deadline: float | None = None) -> Slot:
        """Starts or queues a request. The caller has to `acquire` the slot at once.

        `capacity` is the number of images that the sampler works on at a time.

        Raises:
            QueueFullError: too many requests are waiting, or their init images take too much memory.
            DeadlineTooShortError: the work is not expected to be done within `deadline` seconds.
        """
        self._tick()
        # A request with more images than the capacity takes all of it; otherwise it would wait forever.
        slot = Slot(work, min(work.images, capacity), capacity)
        starts_now = not self._waiting and self._fits(slot)
        if not starts_now and not self._may_wait(work):
            raise QueueFullError("Too many requests are waiting. Try again later.", self._seconds_to_next_start(slot))
        prediction = self._forecast([*self._waiting, slot])
        if prediction is not None:
            slot.estimate = prediction.done
            self._check_deadline(slot, prediction.done, deadline)
        if starts_now:
            self._start(slot)
        else:
            self._waiting.append(slot)
            slot.position = len(self._waiting)
        return slot

    @asynccontextmanager
    async def acquire(self, slot: Slot) -> AsyncIterator[None]:
        """Waits for the slot's turn, and holds it while the block runs."""
        await self._wait_for_admission(slot)
        try:
            yield
            self._measure(slot)
        finally:
            self._leave(slot)

    def remaining_rounds(self, slot: Slot) -> float:
        """The estimated number of rounds left; all rounds while the request waits or the step time is unknown."""
        self._tick()
        if slot not in self._running or not self._step_times.is_known:
            return slot.rounds
        seconds, load = self._time_and_load(slot)
        return max(slot.rounds - seconds / self._step_times.round_seconds(load), 0.0)

    def _may_wait(self, work: Work) -> bool:
        waiting_bytes = sum(slot.work.nbytes for slot in self._waiting)
        has_memory = not (waiting_bytes and work.nbytes) or waiting_bytes + work.nbytes <= self._max_waiting_bytes
        return len(self._waiting) < self._max_waiting and has_memory

    def _check_deadline(self, slot: Slot, expected: float, deadline: float | None) -> None:
        if deadline is None or expected <= deadline:
            return
        alone = forecast(self._step_times, slot.capacity, [], [_remaining_work(slot, slot.rounds)]).done
        if alone <= deadline:
            raise DeadlineTooShortError(expected, deadline, _retry_after(expected - deadline))
        is_idle = not self._running and not self._waiting
        if not is_idle or self._now - self._measured_at < _TRUSTED_SECONDS:
            raise DeadlineTooShortError(alone, deadline, None)

    async def _wait_for_admission(self, slot: Slot) -> None:
        if slot in self._running:
            return
        try:
            await slot.admitted
        except asyncio.CancelledError:
            # It may have been admitted just before it was cancelled.
            if slot in self._waiting:
                self._waiting.remove(slot)
            self._leave(slot)
            raise

    def _leave(self, slot: Slot) -> None:
        self._tick()
        self._running.pop(slot, None)
        while self._waiting and self._fits(self._waiting[0]):
            next_slot = self._waiting.popleft()
            self._start(next_slot)
            next_slot.admitted.set_result(None)

    def _start(self, slot: Slot) -> None:
        self._running[slot] = _Entry(self._now, self._load_seconds)

    def _fits(self, slot: Slot) -> bool:
        return self.running_images + slot.images <= slot.capacity

    def _tick(self) -> None:
        """Brings time and load up to date; called before the load changes."""
        now = self._clock()
        self._load_seconds += (now - self._now) * sum(slot.images * slot.work.load for slot in self._running)
        self._now = now

    def _time_and_load(self, slot: Slot) -> tuple[float, float]:
        """How many seconds a request has been running, and the sampler's mean load in that time."""
        entry = self._running[slot]
        seconds = self._now - entry.seconds
        own = slot.images * slot.work.load
        return seconds, (self._load_seconds - entry.load_seconds) / seconds if seconds else own

    def _measure(self, slot: Slot) -> None:
        self._tick()
        seconds, load = self._time_and_load(slot)
        if seconds:
            # If the slot holds fewer images than the request has, some start later: none takes part in all rounds.
            has_denoising_time = slot.denoising is not None and slot.images == slot.work.images
            denoising = min(slot.denoising or seconds, seconds) if has_denoising_time else seconds
            self._step_times.add_measurement(load, denoising / slot.rounds, seconds - denoising)
            self._measured_at = self._now

    def _forecast(self, waiting: list[Slot]) -> Forecast | None:
        if not self._step_times.is_known:
            return None
        return forecast(
            self._step_times,
            waiting[-1].capacity,
            [_remaining_work(slot, self.remaining_rounds(slot)) for slot in self._running],
            [_remaining_work(slot, slot.rounds) for slot in waiting],
        )

    def _seconds_to_next_start(self, slot: Slot) -> float:
        """Seconds until the first waiting request starts, which makes room in the queue."""
        prediction = self._forecast([self._waiting[0] if self._waiting else slot])
        return _UNKNOWN_RETRY_AFTER if prediction is None else _retry_after(prediction.start)


def _remaining_work(slot: Slot, rounds: float) -> RemainingWork:
    return RemainingWork(slot.images, slot.work.load, rounds)


def _retry_after(seconds: float) -> float:
    return min(max(seconds, _SHORTEST_RETRY_AFTER), _LONGEST_RETRY_AFTER)
