"""Which signals end a process, in order or at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypergen_gateway.serving import SAME_SIGNAL_SECONDS

# Ends when it is told to. Its clock is a file, and says when it is looked at: once for each signal.
WORK = """
import asyncio, pathlib, sys
from hypergen_gateway.serving import run_until_signalled

def clock():
    print("signalled", flush=True)
    return float(pathlib.Path(sys.argv[1]).read_text())

async def work():
    print("begun", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("ending", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print("ended", flush=True)

run_until_signalled(work(), clock)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """What time it is for the work."""
    file = tmp_path / "clock"
    file.write_text("0")
    return file


@pytest.fixture
def start(clock: Path) -> Iterator[Start]:
    """Starts the work; returns when it has begun."""
    started: list[subprocess.Popen[str]] = []

    def begin(*prefix: str) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-c", WORK, str(clock)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
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


def let_end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(start: Start, number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    assert [said(process), said(process)] == ["signalled", "ending"]
    let_end(process)
    assert said(process) == "ended"
    process.wait(60)


def test_a_terminal_that_closes_does_not_end_what_was_detached_from_it(start: Start) -> None:
    process = start("nohup")
    process.send_signal(signal.SIGHUP)
    process.terminate()
    assert [said(process), said(process)] == ["signalled", "ending"]
    let_end(process)
    assert said(process) == "ended"


def test_a_signal_that_is_sent_twice_is_one(start: Start, clock: Path) -> None:
    """As `timeout` does, to the process and to its group."""
    process = start()
    process.terminate()
    assert [said(process), said(process)] == ["signalled", "ending"]
    clock.write_text(str(0.99 * SAME_SIGNAL_SECONDS))
    process.terminate()
    assert said(process) == "signalled"
    let_end(process)
    assert said(process) == "ended"


def test_a_second_one_ends_what_does_not_end(start: Start, clock: Path) -> None:
    process = start()
    process.terminate()
    assert [said(process), said(process)] == ["signalled", "ending"]
    clock.write_text(str(SAME_SIGNAL_SECONDS))
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
