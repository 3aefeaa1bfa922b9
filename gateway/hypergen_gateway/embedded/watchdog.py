"""Detects a hanging Triton, whose processes are alive but neither running nor runnable.

A slow Triton must not be mistaken for a hanging one: a step of a large model on a loaded machine takes many seconds. So
there is no time limit for work. A working process uses the CPU, or waits for it or for the disk, and even idle Triton
processes wake up several times a second. Linux counts their CPU time in nanoseconds.

Checks are counted instead of seconds, so a suspended machine or a paused container causes no false alarm.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LOOK_SECONDS = 0.25
# Checks until a process that uses no CPU time counts as hanging: it is stopped, frozen or deadlocked.
STILL_LOOKS = 12
# The same if requests are running but the processes use no more CPU time than idle ones.
STUCK_LOOKS = 40
IDLE_SHARE = 0.02
# Failed liveness probes; each has a timeout of PROBE_SECONDS.
UNANSWERED_PROBES = 3
PROBE_SECONDS = 3.0

_RUNNING_OR_IN_IO = frozenset("RD")


class Process(Protocol):
    """A process as the watchdog sees it."""

    @property
    def name(self) -> str:
        """Description for the log."""
        ...

    def cpu_seconds(self) -> float:
        """The CPU time of all its threads so far."""
        ...

    def wants_to_run(self) -> bool:
        """Whether one of its threads runs, waits for a CPU, or waits for the disk."""
        ...


@dataclass(frozen=True)
class LinuxProcess:
    """A local process. One that has exited reads as running, as exits are detected elsewhere."""

    pid: int
    name: str

    def cpu_seconds(self) -> float:
        """The CPU clock of the process, with the clock id of clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return time.monotonic()

    def wants_to_run(self) -> bool:
        """Whether the state of a thread in proc(5) is running or in I/O."""
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                if stat.read_text().rpartition(") ")[2][:1] in _RUNNING_OR_IN_IO:
                    return True
        return False


@dataclass
class _Watched:
    process: Process
    cpu: float
    still_looks: int = 0


class Watchdog:
    """Checks the processes of a server every `LOOK_SECONDS`. `at_work` returns whether requests are running.

    The first of `processes` is the server itself.
    """

    def __init__(self, processes: Sequence[Process], at_work: Callable[[], bool]) -> None:
        self._watched = [_Watched(process, process.cpu_seconds()) for process in processes]
        self._at_work = at_work
        self._idle_looks = 0
        self._unanswered = 0

    def probed(self, *, answered: bool) -> None:
        """Record a liveness probe."""
        self._unanswered = 0 if answered else self._unanswered + 1

    def look(self) -> str | None:
        """A description of what hangs; None if nothing does."""
        used = sum(self._look_at(watched) for watched in self._watched)
        if still := [each for each in self._watched if each.still_looks >= STILL_LOOKS]:
            return f"{' and '.join(each.process.name for each in still)}, not running for {_seconds(STILL_LOOKS)}"
        if self._unanswered >= UNANSWERED_PROBES and not self._watched[0].process.wants_to_run():
            return f"{self._watched[0].process.name}, not answering"
        if self._is_stuck(used):
            return f"running requests have made no progress for {_seconds(STUCK_LOOKS)}"
        return None

    def _look_at(self, watched: _Watched) -> float:
        """The CPU time used since the last check."""
        cpu = watched.process.cpu_seconds()
        used, watched.cpu = cpu - watched.cpu, cpu
        # A process that waits for the CPU is starved, not hanging.
        is_still = used == 0 and not watched.process.wants_to_run()
        watched.still_looks = watched.still_looks + 1 if is_still else 0
        return used

    def _is_stuck(self, used: float) -> bool:
        is_idle = used < IDLE_SHARE * LOOK_SECONDS
        if is_idle and self._at_work() and not any(each.process.wants_to_run() for each in self._watched):
            self._idle_looks += 1
        else:
            self._idle_looks = 0
        return self._idle_looks >= STUCK_LOOKS


def _seconds(looks: int) -> str:
    return f"{looks * LOOK_SECONDS:.0f} s"
