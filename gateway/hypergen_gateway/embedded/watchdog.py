"""Notices a Triton that hangs: whose processes live and do nothing.

A slow one must never be taken for it: a step of a large model on a loaded machine takes many seconds. So no clock
decides how long work may take; what tells a process that hangs is that it neither runs nor wants to. Whoever computes
uses the CPU, or waits for its turn or for the disk; and Triton's processes, even with nothing to do, wake up several
times a second to look after each other. Linux counts the CPU time of each to the nanosecond.

Looks are counted, not seconds: a machine that slept, or a container that was paused, has missed none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LOOK_SECONDS = 0.25
# A process that does not run at all: stopped, frozen, or with all its threads in a lock for good.
STILL_LOOKS = 12
# Work is under way and nobody does any of it: what the processes use meanwhile is what they use to stay awake.
STUCK_LOOKS = 40
IDLE_SHARE = 0.02
# The server does not answer whether it lives; each answer is waited for PROBE_SECONDS.
UNANSWERED_PROBES = 3
PROBE_SECONDS = 3.0

_RUNNING_OR_IN_IO = frozenset("RD")


class Process(Protocol):
    """What the watchdog sees of a process."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        ...

    def cpu_seconds(self) -> float:
        """The CPU time of all its threads so far."""
        ...

    def wants_to_run(self) -> bool:
        """Whether one of its threads runs, waits for a CPU, or waits for the disk."""
        ...


@dataclass(frozen=True)
class LinuxProcess:
    """A process of this machine. One that has ended reads as one that runs: its end is noticed elsewhere."""

    pid: int
    name: str

    def cpu_seconds(self) -> float:
        """By the clock's id as clock_getcpuclockid(3) makes it of a process."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return time.monotonic()

    def wants_to_run(self) -> bool:
        """By the state of each thread, as proc(5) has it."""
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
    """Looks at a server and its models' processes every `LOOK_SECONDS`. `at_work` says whether somebody waits for them.

    The first of `processes` is the server itself.
    """

    def __init__(self, processes: Sequence[Process], at_work: Callable[[], bool]) -> None:
        self._watched = [_Watched(process, process.cpu_seconds()) for process in processes]
        self._at_work = at_work
        self._idle_looks = 0
        self._unanswered = 0

    def probed(self, *, answered: bool) -> None:
        """The server was asked whether it lives."""
        self._unanswered = 0 if answered else self._unanswered + 1

    def look(self) -> str | None:
        """What hangs, in words; None where nothing does."""
        used = sum(self._look_at(watched) for watched in self._watched)
        if still := [each for each in self._watched if each.still_looks >= STILL_LOOKS]:
            return f"{' and '.join(each.process.name for each in still)}, not running for {_seconds(STILL_LOOKS)}"
        if self._unanswered >= UNANSWERED_PROBES and not self._watched[0].process.wants_to_run():
            return f"the answers of {self._watched[0].process.name}"
        if self._is_stuck(used):
            return f"the work under way, on which nobody has worked for {_seconds(STUCK_LOOKS)}"
        return None

    def _look_at(self, watched: _Watched) -> float:
        """The CPU time that it has used since the last look."""
        cpu = watched.process.cpu_seconds()
        used, watched.cpu = cpu - watched.cpu, cpu
        # A process that waits for a CPU all the while is starved by others, not hanging.
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
