"""Which signals end a process, in order or at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from hypergen_gateway.serving import SAME_SIGNAL_SECONDS

WORK = """
import asyncio, sys
from hypergen_gateway.serving import run_until_signalled

async def work():
    print("begun", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("ending", flush=True)
        await asyncio.sleep(float(sys.argv[1]))
        print("ended", flush=True)

run_until_signalled(work())
"""
InitImage = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[InitImage]:
    """Starts work whose end takes so many seconds; returns when it has begun."""
    started: list[subprocess.Popen[str]] = []

    def begin(seconds: float, *prefix: str) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-c", WORK, str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(process)
        assert said(process) == "begun"
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(start: InitImage, number: signal.Signals) -> None:
    process = start(0)
    process.send_signal(number)
    assert [said(process), said(process)] == ["ending", "ended"]
    process.wait(10)


def test_a_terminal_that_closes_does_not_end_what_was_detached_from_it(start: InitImage) -> None:
    process = start(0, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert [said(process), said(process)] == ["ending", "ended"]


def test_a_signal_that_is_sent_twice_is_one(start: InitImage) -> None:
    """As `timeout` does, to the process and to its group."""
    process = start(0.5)
    process.terminate()
    assert said(process) == "ending"
    process.terminate()
    assert said(process) == "ended"


def test_a_second_one_ends_what_does_not_end(start: InitImage) -> None:
    process = start(60)
    process.terminate()
    assert said(process) == "ending"
    time.sleep(SAME_SIGNAL_SECONDS)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
