"""Children of a gateway: they start whatever else it does, and end with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

from hypergen_gateway.embedded.processes import dying_with_parent, module_command

STARTS = 40


class Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers every call with its request."""

    def service(self, _: Any) -> Any:
        async def answer(request: bytes, _: Any) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def calls_of_grpc(tasks: int = 4, threads: int = 2) -> AsyncIterator[None]:
    """Tasks and threads that call a server of gRPC all the time, as requests for images do."""
    server = grpc.aio.server(handlers=[Echo()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    done = threading.Event()

    async def call_in_loop(channel: Any) -> None:
        while not done.is_set():
            await channel.unary_unary("/any/method")(b"request", timeout=60)

    def call_in_thread(channel: Any) -> None:
        while not done.is_set():
            channel.unary_unary("/any/method")(b"request", timeout=60)

    async with grpc.aio.insecure_channel(address) as channel:
        with grpc.insecure_channel(address) as other:
            calls = [asyncio.create_task(call_in_loop(channel)) for _ in range(tasks)]
            calls += [asyncio.create_task(asyncio.to_thread(call_in_thread, other)) for _ in range(threads)]
            yield
            done.set()
            await asyncio.gather(*calls)
    await server.stop(None)


async def exit_code(*command: str) -> int:
    process = await asyncio.create_subprocess_exec(*dying_with_parent(*command), stdin=asyncio.subprocess.DEVNULL)
    return await asyncio.wait_for(process.wait(), 60)


async def test_none_crashes_while_other_threads_call_grpc() -> None:
    """A LoRA that is added, or a Triton that is replaced, under load."""
    async with calls_of_grpc():
        codes = Counter([await exit_code("true") for _ in range(STARTS)])
    assert codes == {0: STARTS}


async def test_it_is_the_command_itself_with_its_arguments_and_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "a file with ö"
    code = f"import os, sys; open({str(file)!r}, 'w').write(f'{{os.getpid()}} {{sys.argv[1:]}}'); sys.exit(7)"
    process = await asyncio.create_subprocess_exec(*dying_with_parent(sys.executable, "-c", code, "a b", ""))
    assert await asyncio.wait_for(process.wait(), 60) == 7
    assert file.read_text() == f"{process.pid} ['a b', '']"


def test_a_program_that_is_missing_is_one_line() -> None:
    ended = subprocess.run(dying_with_parent("/no/such/program"), capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "/no/such/program: No such file or directory\n")


def test_it_ends_when_its_parent_is_killed() -> None:
    module = dying_with_parent.__module__
    code = f"import subprocess; from {module} import *; subprocess.run(dying_with_parent('sleep', '600'))"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            child = child_of(parent, "sleep")
        finally:
            parent.kill()
    child.wait(60)
    assert not child.is_running()


def child_of(parent: subprocess.Popen[bytes], name: str) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(parent.pid).children():
            if child.name() == name:
                return child
        time.sleep(0.05)
    raise AssertionError(f"no {name} was started")


def test_a_child_whose_parent_has_ended_already_does_nothing() -> None:
    command = dying_with_parent("echo", "started")
    command[4] = "1"
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_a_module_of_the_current_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "calendar.py").write_text("print('the wrong one')")
    command = dying_with_parent(*module_command("calendar"), "--help")
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert "wrong one" not in ended.stdout
