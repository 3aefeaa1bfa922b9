"""Time limits and cancellation; when blocking work runs in a thread, and how many bytes of it at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
CANCEL_SECONDS = 10.0


async def run_with_timeout(work: Awaitable[T], seconds: float) -> T:
    """The result of `work`, which is cancelled after `seconds`.

    For `asyncio.wait_for`, which until Python 3.12 swallows a cancellation that arrives just as the work ends.

    Raises:
        TimeoutError: `work` has not ended within `seconds`.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        await cancel(task)


async def cancel(*tasks: asyncio.Future[Any], seconds: float = CANCEL_SECONDS) -> None:
    """Cancel tasks and wait for them to end, for at most `seconds`. Their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.wait({asyncio.gather(*tasks, return_exceptions=True)}, timeout=seconds)
    for task in tasks:
        if not task.done():
            logger.error("A task has not ended within %g s of its cancellation: %r", seconds, task)


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
        admitted = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            # It may have been given room just before it was cancelled.
            self.release(0 if admitted.cancelled() else nbytes)
            raise

    def release(self, nbytes: int) -> None:
        """Gives room back and admits waiting work."""
        self._taken -= nbytes
        while self._waiting:
            next_nbytes, admitted = self._waiting[0]
            if not admitted.done():
                if not self._has_room(next_nbytes):
                    return
                self._taken += next_nbytes
                admitted.set_result(None)
            self._waiting.popleft()

    def _has_room(self, nbytes: int) -> bool:
        return not self._taken or self._taken + nbytes <= self._limit
