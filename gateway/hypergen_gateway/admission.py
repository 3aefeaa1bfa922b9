"""Who may go to Triton now, and who waits.

Triton does not push back on a decoupled model: it takes every request at once. So at most as many images as the
sampler works on are let through, the other requests wait here in order of arrival, and beyond a limit they are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hypergen_gateway.errors import QueueFullError

# The SDKs do not wait for a Retry-After above 120 s.
_LONGEST_RETRY_AFTER = 120.0
# How much the latest request counts in the mean duration.
_SMOOTHING = 0.2


@dataclass(eq=False)
class _Ticket:
    images: int
    capacity: int
    called: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """A first-come, first-served gate for images. Belongs to one event loop."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[_Ticket] = deque()
        self._running: dict[_Ticket, float] = {}  # with the time of entry
        self._mean_seconds: float | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def admit(self, images: int, capacity: int) -> AsyncIterator[None]:
        """Holds places for `images` out of `capacity` while the block runs; raises `QueueFullError` at once."""
        # A request of more images than there are places takes them all, or it would wait for ever.
        ticket = _Ticket(min(images, capacity), capacity)
        await self._enter(ticket)
        try:
            yield
            self._measure(time.monotonic() - self._running[ticket])
        finally:
            del self._running[ticket]
            self._call_next()

    async def _enter(self, ticket: _Ticket) -> None:
        if not self._waiting and self._fits(ticket):
            self._running[ticket] = time.monotonic()
            return
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError("Too many requests are waiting. Try again later.", self._seconds_to_next_place())
        self._waiting.append(ticket)
        try:
            await ticket.called
        except asyncio.CancelledError:
            self._forget(ticket)
            raise

    def _forget(self, ticket: _Ticket) -> None:
        """A waiting request left, perhaps in the very moment in which it was called."""
        if ticket in self._running:
            del self._running[ticket]
        else:
            self._waiting.remove(ticket)
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            ticket = self._waiting.popleft()
            self._running[ticket] = time.monotonic()
            ticket.called.set_result(None)

    def _fits(self, ticket: _Ticket) -> bool:
        return sum(running.images for running in self._running) + ticket.images <= ticket.capacity

    def _measure(self, seconds: float) -> None:
        mean = seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = mean + _SMOOTHING * (seconds - mean)

    def _seconds_to_next_place(self) -> float:
        """With k requests running, one ends about every k-th part of a request's duration; 1 s if none ended yet."""
        if self._mean_seconds is None:
            return 1.0
        return min(self._mean_seconds / max(len(self._running), 1), _LONGEST_RETRY_AFTER)
