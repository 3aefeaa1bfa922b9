"""Cancelling tasks; blocking work in threads, and a limit on how much of it runs at once, in bytes of data."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for them to end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_in_thread_if_large(work: Callable[[], T], nbytes: int, *, quick: int) -> T:
    """Runs `work` over `nbytes` of data: in a thread if that is more than `quick`, else on the event loop.

    `quick` is how many bytes take no longer than a round trip to a thread, a fifth of a millisecond.
    """
    return work() if nbytes <= quick else await asyncio.to_thread(work)


class ByteBudget:
    """A limit on the bytes being processed, first come, first served. Work larger than the limit runs alone.

    Bound to one event loop.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, nbytes: int) -> None:
        """Waits for room, which the caller gives back with `release`."""
        if not self._waiting and self._has_room(nbytes):
            self._taken += nbytes
            return
        called = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, called))
        try:
            await called
        except asyncio.CancelledError:
            # It may have been given room just before it was cancelled.
            self.release(0 if called.cancelled() else nbytes)
            raise

    def release(self, nbytes: int) -> None:
        """Gives room back and admits waiting work."""
        self._taken -= nbytes
        while self._waiting:
            wanted, called = self._waiting[0]
            if not called.done():
                if not self._has_room(wanted):
                    return
                self._taken += wanted
                called.set_result(None)
            self._waiting.popleft()

    def _has_room(self, nbytes: int) -> bool:
        return not self._taken or self._taken + nbytes <= self._limit
