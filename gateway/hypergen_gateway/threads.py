"""Whether work holds up everybody for a moment, or goes to a thread, which takes a moment by itself.

Knows nothing of the work but the data that it goes over, which is what its time depends on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def off_the_loop(work: Callable[[], T], nbytes: int, *, quick: int) -> T:
    """The result of `work`, which goes over `nbytes`: from a thread, unless they are `quick` ones at most.

    Having a thread do something and hearing of it takes a fifth of a millisecond: `quick` is what takes no longer.
    """
    return work() if nbytes <= quick else await asyncio.to_thread(work)
