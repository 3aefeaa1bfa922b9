"""A command that serves: started as it stands, asked for an image, ended, and looked at for what it leaves behind."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.environments import ToolError
from clients import judging
from clients.judging import References
from support.running_server import Server, free_port, start_process, stop_server, wait_for_server

REFUSAL_SECONDS = 180.0
# make passes the signal on, waits, and then ends by it itself.
TERMINATED = -15
# Servers run outside the checkout, of which nothing is then found by chance.
OUTSIDE = Path("/")


@dataclass(frozen=True)
class Command:
    """A command line that serves, and the variables that it has beside this process's own."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_make(self) -> bool:
        return "make" in self.words

    def line(self, port: int) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port)]
        return [*self.words, f"ARGS={' '.join(options)}"] if self.by_make else [*self.words, *options]

    def variables(self) -> dict[str, str]:
        # Bytecode is written, as on its users' machines: uv installs none, and a start would compile torch each time.
        return {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **self.environment}


def serve_an_image(command: Command, references: References) -> float:
    """Serve the shipped model, generate an image, and stop; the seconds until it is ready.

    Raises:
        AssertionError: it does not serve.
        WrongImageError: the image is not that of the prompt.
        ToolError: it does not end as it should, or leaves something behind.
    """
    began, port = time.monotonic(), free_port()
    server = Server(start_process(command.line(port), command.variables(), OUTSIDE), port, "")
    wait_for_server(server)
    ready = time.monotonic() - began
    children = psutil.Process(server.process.pid).children(recursive=True)
    try:
        response = server.client().images.generate(prompt=judging.PROMPT, extra_body={"seed": 1})
        (image,) = response.data or []
        judging.check_rocket(judging.decode(base64.b64decode(image.b64_json or "")), references)
    finally:
        code = stop(server, children)
    if code != (TERMINATED if command.by_make else 0):
        raise ToolError("\n".join([f"it ended with {code}", *server.lines[-10:]]))
    check_nothing_is_left([server.process.pid, *(child.pid for child in children)])
    return ready


def stop(server: Server, children: Sequence[psutil.Process], timeout: float = 60.0) -> int:
    """End it and return its exit code. Raises ToolError if it does not end, and kills its children then, too."""
    try:
        return stop_server(server, timeout)
    except subprocess.TimeoutExpired as error:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        raise ToolError(f"it did not end within {timeout:g} s") from error


def check_nothing_is_left(pids: Sequence[int]) -> None:
    """Raise ToolError if one of these processes runs, or shared memory of theirs is there.

    The shared memory is this machine's: that of a mount of their own has gone with them.
    """
    if running := [pid for pid in pids if psutil.pid_exists(pid)]:
        raise ToolError(f"processes are left behind: {running}")
    regions = [str(region) for pid in pids for region in Path("/dev/shm").glob(f"hypergen-triton-{pid}-*")]
    if regions:
        raise ToolError(f"shared memory is left behind: {regions}")


def refusal(command: Command) -> str:
    """The last line of a command that does not serve. Raises ToolError if it serves or crashes."""
    try:
        done = subprocess.run(
            command.line(free_port()),
            env=command.variables(),
            cwd=OUTSIDE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=REFUSAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"it was not refused within {REFUSAL_SECONDS:.0f} s") from error
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("make")]
    if done.returncode == 0 or not lines or "Traceback" in done.stdout:
        raise ToolError("\n".join([f"it ended with {done.returncode}", *lines[-20:]]))
    return lines[-1]
