"""The parts of `make installs`: what counts as refused and as left behind, and the page with its table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.environments import ToolError
from installs.check import WAYS, Result, Way, row
from installs.places import find_python, python_for, torch_release
from installs.serving import Command, check_nothing_is_left, refusal, stop
from support.running_server import Server, start_process

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/installs.md").read_text(encoding="utf-8")


def command(script: str) -> Command:
    return Command(["sh", "-c", script])


def test_a_refusal_is_the_last_line_of_a_command_that_fails() -> None:
    assert refusal(command("echo exporting; echo this Python cannot >&2; exit 1")) == "this Python cannot"


@pytest.mark.parametrize("script", ["echo Serving", "exit 1", "echo 'Traceback (most recent call last):'; exit 1"])
def test_what_serves_says_nothing_or_crashes_is_no_refusal(script: str) -> None:
    with pytest.raises(ToolError):
        refusal(command(script))


def test_a_process_that_lives_is_left_behind() -> None:
    with pytest.raises(ToolError, match=f"left behind: .{os.getpid()}"):
        check_nothing_is_left([os.getpid()])


def test_what_does_not_end_is_killed_with_its_children() -> None:
    process = start_process(["sh", "-c", "trap '' TERM; sleep 60 & echo started; wait"], dict(os.environ))
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        (child,) = psutil.Process(process.pid).children()
        with pytest.raises(ToolError, match=r"did not end within 0\.1 s"):
            stop(Server(process, 0, ""), [child], 0.1)
        assert not psutil.wait_procs([child], timeout=10)[1]


def test_make_gets_the_address_as_its_arguments() -> None:
    assert Command(["hypergen", "serve"]).line(1)[-4:] == ["--host", "127.0.0.1", "--port", "1"]
    assert Command(["make", "serve"]).line(1)[-1] == "ARGS=--host 127.0.0.1 --port 1"


def test_a_python_is_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv has a stub for every version that it knows of, which runs only where that is chosen."""
    stubs, programs = tmp_path / "stubs", tmp_path / "programs"
    for folder in (stubs, programs):
        folder.mkdir()
    (stubs / "python3.11").write_text("#!/bin/sh\nexit 127\n")
    (stubs / "python3.11").chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", f"{stubs}:{programs}")
    with pytest.raises(ToolError, match=r"no Python 3\.11 here"):
        find_python("3.11")
    (programs / "python3.11").symlink_to(os.path.realpath(sys.executable))
    assert find_python("3.11") == f"{programs}/python3.11"
    with pytest.raises(ToolError, match="no Python that the user"):
        python_for(["/bin/false"])


def test_torch_is_the_release_that_make_installs() -> None:
    assert f"TORCH ?= {torch_release()}\n" in (ROOT / "Makefile").read_text()


def test_a_row_says_what_came_of_a_way() -> None:
    way = Way("wheel", "by pip", lambda _: Result())
    assert row(way, Result(61.2, 9.6)) == "| wheel | by pip | an image | 61 s | 10 s |"
    assert row(way, Result(outcome="refused in one line")) == "| wheel | by pip | refused in one line | – | – |"
    assert row(way, None) == "| wheel | by pip | fails |  |  |"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_page_has_each_way_with_what_came_of_it(way: Way) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {way.name} | {way.words} |")]
    assert "fails" not in line
