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
    places: int
    capacity: int
    position: int = 0
    estimate: float | None = None
    denoising: float | None = None
    called: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def rounds(self) -> float:
        """The number of rounds it takes part in; if it has more images than places, some start after others."""
        return self.work.steps * self.work.images / self.places


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
        self._pace = StepTimeModel()
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
        """The number of places that are taken."""
        return sum(place.places for place in self._running)

    def enter(self, work: Work, capacity: int, deadline: float | None = None) -> Slot:
        """Starts or queues a request. The caller has to `acquire` the slot at once.

        `capacity` is the number of places: the images that the sampler works on at a time.

        Raises:
            QueueFullError: too many requests are waiting, or their init images take too much memory.
            DeadlineTooShortError: the work is not expected to be done within `deadline` seconds.
        """
        self._tick()
        # A request with more images than there are places takes them all; otherwise it would wait forever.
        place = Slot(work, min(work.images, capacity), capacity)
        goes_at_once = not self._waiting and self._fits(place)
        if not goes_at_once and not self._may_wait(work):
            raise QueueFullError("Too many requests are waiting. Try again later.", self._seconds_to_next_place(place))
        expected = self._forecast([*self._waiting, place])
        if expected is not None:
            place.estimate = expected.done
            self._check_deadline(place, expected.done, deadline)
        if goes_at_once:
            self._start(place)
        else:
            self._waiting.append(place)
            place.position = len(self._waiting)
        return place

    @asynccontextmanager
    async def acquire(self, place: Slot) -> AsyncIterator[None]:
        """Waits for the slot's turn, and holds it while the block runs."""
        await self._called(place)
        try:
            yield
            self._measure(place)
        finally:
            self._leave(place)

    def rounds_left(self, place: Slot) -> float:
        """The estimated number of rounds left; all rounds while the request waits or the step time is unknown."""
        self._tick()
        if place not in self._running or not self._pace.is_known:
            return place.rounds
        seconds, load = self._stay(place)
        return max(place.rounds - seconds / self._pace.round_seconds(load), 0.0)

    def _may_wait(self, work: Work) -> bool:
        waiting_bytes = sum(place.work.nbytes for place in self._waiting)
        has_memory = not (waiting_bytes and work.nbytes) or waiting_bytes + work.nbytes <= self._max_waiting_bytes
        return len(self._waiting) < self._max_waiting and has_memory

    def _check_deadline(self, place: Slot, expected: float, deadline: float | None) -> None:
        if deadline is None or expected <= deadline:
            return
        alone = forecast(self._pace, place.capacity, [], [_rounds(place, place.rounds)]).done
        if alone <= deadline:
            raise DeadlineTooShortError(expected, deadline, _retry_after(expected - deadline))
        is_idle = not self._running and not self._waiting
        if not is_idle or self._now - self._measured_at < _TRUSTED_SECONDS:
            raise DeadlineTooShortError(alone, deadline, None)

    async def _called(self, place: Slot) -> None:
        if place in self._running:
            return
        try:
            await place.called
        except asyncio.CancelledError:
            # It may have been called just before it was cancelled.
            if place in self._waiting:
                self._waiting.remove(place)
            self._leave(place)
            raise

    def _leave(self, place: Slot) -> None:
        self._tick()
        self._running.pop(place, None)
        while self._waiting and self._fits(self._waiting[0]):
            following = self._waiting.popleft()
            self._start(following)
            following.called.set_result(None)

    def _start(self, place: Slot) -> None:
        self._running[place] = _Entry(self._now, self._load_seconds)

    def _fits(self, place: Slot) -> bool:
        return self.running_images + place.places <= place.capacity

    def _tick(self) -> None:
        """Brings time and load up to date; called before the load changes."""
        now = self._clock()
        self._load_seconds += (now - self._now) * sum(place.places * place.work.load for place in self._running)
        self._now = now

    def _stay(self, place: Slot) -> tuple[float, float]:
        """How many seconds a request has been running, and the sampler's mean load in that time."""
        entry = self._running[place]
        seconds = self._now - entry.seconds
        own = place.places * place.work.load
        return seconds, (self._load_seconds - entry.load_seconds) / seconds if seconds else own

    def _measure(self, place: Slot) -> None:
        self._tick()
        seconds, load = self._stay(place)
        if seconds:
            # If a request has more images than places, some start after others, and none takes part in all rounds.
            is_told = place.denoising is not None and place.places == place.work.images
            in_rounds = min(place.denoising or seconds, seconds) if is_told else seconds
            self._pace.learn(load, in_rounds / place.rounds, seconds - in_rounds)
            self._measured_at = self._now

    def _forecast(self, waiting: list[Slot]) -> Forecast | None:
        if not self._pace.is_known:
            return None
        return forecast(
            self._pace,
            waiting[-1].capacity,
            [_rounds(place, self.rounds_left(place)) for place in self._running],
            [_rounds(place, place.rounds) for place in waiting],
        )

    def _seconds_to_next_place(self, place: Slot) -> float:
        """Seconds until the first waiting request starts, which makes room in the queue."""
        expected = self._forecast([self._waiting[0] if self._waiting else place])
        return _UNKNOWN_RETRY_AFTER if expected is None else _retry_after(expected.placed)


def _rounds(place: Slot, left: float) -> RemainingWork:
    return RemainingWork(place.places, place.work.load, left)


def _retry_after(seconds: float) -> float:
    return min(max(seconds, _SHORTEST_RETRY_AFTER), _LONGEST_RETRY_AFTER)
