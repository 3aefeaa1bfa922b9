"""What is taken for a Triton that hangs, and what never is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from hypergen_gateway.embedded.watchdog import (
    LOOK_SECONDS,
    STILL_LOOKS,
    STUCK_LOOKS,
    UNANSWERED_PROBES,
    LinuxProcess,
    Watchdog,
)

AN_HOUR_OF_LOOKS = int(3600 / LOOK_SECONDS)
AWAKE = 1e-5  # what waking up costs between two looks


@dataclass
class FakeProcess:
    name: str
    cpu_a_look: float = AWAKE
    wants: bool = False
    cpu: float = 0.0

    def cpu_seconds(self) -> float:
        self.cpu += self.cpu_a_look
        return self.cpu

    def wants_to_run(self) -> bool:
        return self.wants


def looks_until_hanging(watchdog: Watchdog, most: int = AN_HOUR_OF_LOOKS) -> tuple[int, str] | None:
    for number in range(1, most + 1):
        if hanging := watchdog.look():
            return number, hanging
    return None


@pytest.fixture
def server() -> FakeProcess:
    return FakeProcess("tritonserver")


@pytest.fixture
def unet() -> FakeProcess:
    return FakeProcess("the process of unet")


def test_an_idle_triton_does_not_hang(server: FakeProcess, unet: FakeProcess) -> None:
    assert looks_until_hanging(Watchdog([server, unet], at_work=lambda: False)) is None


def test_a_step_may_take_an_hour_while_somebody_computes_it(server: FakeProcess, unet: FakeProcess) -> None:
    unet.cpu_a_look = LOOK_SECONDS / 2
    assert looks_until_hanging(Watchdog([server, unet], at_work=lambda: True)) is None


def test_a_step_may_take_an_hour_while_others_have_the_cores(server: FakeProcess, unet: FakeProcess) -> None:
    unet.cpu_a_look, unet.wants = 0.0, True
    assert looks_until_hanging(Watchdog([server, unet], at_work=lambda: True)) is None


def test_a_server_without_a_turn_may_leave_probes_unanswered(server: FakeProcess, unet: FakeProcess) -> None:
    watchdog = Watchdog([server, unet], at_work=lambda: False)
    server.wants = True
    for _ in range(10 * UNANSWERED_PROBES):
        watchdog.probed(answered=False)
    assert looks_until_hanging(watchdog) is None


def test_a_process_that_does_not_run_hangs(server: FakeProcess, unet: FakeProcess) -> None:
    unet.cpu_a_look = 0.0
    found = looks_until_hanging(Watchdog([server, unet], at_work=lambda: False))
    assert found == (STILL_LOOKS, "the process of unet, not running for 3 s")


def test_work_that_nobody_does_hangs(server: FakeProcess, unet: FakeProcess) -> None:
    found = looks_until_hanging(Watchdog([server, unet], at_work=lambda: True))
    assert found == (STUCK_LOOKS, "running requests have made no progress for 10 s")


def test_a_pause_between_two_pieces_of_work_is_none(server: FakeProcess, unet: FakeProcess) -> None:
    work = iter([True] * (STUCK_LOOKS - 1) + [False] + [True] * (STUCK_LOOKS - 1))
    assert looks_until_hanging(Watchdog([server, unet], at_work=lambda: next(work)), 2 * STUCK_LOOKS - 1) is None


def test_a_server_that_does_not_answer_hangs_unless_it_answers_again(server: FakeProcess, unet: FakeProcess) -> None:
    watchdog = Watchdog([server, unet], at_work=lambda: False)
    for answered in (False, False, True, False, False):
        watchdog.probed(answered=answered)
    assert watchdog.look() is None
    watchdog.probed(answered=False)
    assert watchdog.look() == "tritonserver, not answering"


def test_linux_tells_a_process_that_runs_from_one_that_is_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        process = LinuxProcess(child.pid, "busy")
        try:
            assert process.wants_to_run()
            os.kill(child.pid, signal.SIGSTOP)
            time.sleep(0.1)
            assert not process.wants_to_run()
            assert process.cpu_seconds() == process.cpu_seconds() > 0
        finally:
            child.kill()


def test_a_process_that_has_ended_does_not_count_as_hanging() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    process = LinuxProcess(child.pid, "ended")
    assert not process.wants_to_run()
    assert process.cpu_seconds() != process.cpu_seconds()
