"""The systems under measurement: servers behind OpenAI's client, and libraries in a process of their own.

An image is complete when its decoded pixels are in memory. A server's time includes the client's work up to that; a
library is timed inside its own process, without the pipe.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import httpx
import numpy as np
import openai
import psutil
from PIL import Image

from benchmarks.environments import ToolError

STOP_SECONDS = 20
KEEPALIVE_SECONDS = 2
# No peer may look anything up on the hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One image, requested alike from every target."""

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int


class Target(Protocol):
    """Generates images. `process` is the one that was started; its children belong to it."""

    name: str
    process: psutil.Process

    async def generate(self, request: GenerationRequest) -> float:
        """Seconds until the image is complete. Raises ToolError if it fails or takes longer than the limit."""

    async def stop(self) -> None:
        """End it and all its children."""


class Server:
    """An HTTP server with OpenAI's API, called with OpenAI's own client."""

    def __init__(self, name: str, process: psutil.Popen, url: str, log: Path, limit: float) -> None:
        self.name = name
        self.process: psutil.Process = process
        self.url = url
        self._log = log
        self._limit = limit
        # Shorter than uvicorn's, as in HyperGen 0.1: it would close connections just when they are used again.
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(keepalive_expiry=KEEPALIVE_SECONDS)
        connections = openai.DefaultAsyncHttpxClient(limits=limits)
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=limit, http_client=connections
        )

    async def generate(self, request: GenerationRequest) -> float:
        began = time.perf_counter()
        try:
            response = await asyncio.wait_for(self._ask(request), self._limit)
        except (asyncio.TimeoutError, openai.OpenAIError) as error:
            raise _failure(self, error, self._limit) from error
        assert response.data is not None
        with Image.open(io.BytesIO(base64.b64decode(response.data[0].b64_json or ""))) as image:
            pixels = np.asarray(image.convert("RGB"))
        seconds = time.perf_counter() - began
        _check(self, pixels.shape, float(pixels.std()), request)
        return seconds

    async def _ask(self, request: GenerationRequest) -> openai.types.ImagesResponse:
        own = {"num_inference_steps": request.steps, "guidance_scale": request.guidance, "seed": request.seed}
        size: Any = f"{request.width}x{request.height}"
        return await self._client.images.generate(
            prompt=request.prompt, size=size, response_format="b64_json", extra_body=own
        )

    def said(self, pattern: str) -> str:
        """The pattern's group in the server's log. Raises ToolError if there is none."""
        found = re.search(pattern, self._log.read_text(errors="replace"))
        if found is None:
            raise ToolError(f"{self.name} has not said {pattern!r}")
        return found[1]

    async def stop(self) -> None:
        await self._client.close()
        await asyncio.to_thread(end, self.process)


class Worker:
    """A library in a process of its own, which `workers/protocol.py` describes."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, limit: float) -> None:
        self.name = name
        self.process = psutil.Process(process.pid)
        self._pipes = process
        self._limit = limit
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def load(self, options: dict[str, Any], limit: float) -> None:
        """Load the checkpoint. Raises ToolError."""
        self._send(options)
        assert self._pipes.stdout is not None
        try:
            line = await asyncio.wait_for(self._pipes.stdout.readline(), limit)
        except asyncio.TimeoutError as error:
            raise ToolError(f"{self.name} was not ready after {limit:,.0f} s") from error
        if not line:
            raise ToolError(f"{self.name} ended while it loaded")
        self._reader = asyncio.create_task(self._read())

    async def generate(self, request: GenerationRequest, **more: Any) -> float:
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._send({"id": number, **asdict(request), **more})
        try:
            answer = await asyncio.wait_for(future, self._limit)
        except asyncio.TimeoutError as error:
            raise _failure(self, error, self._limit) from error
        if "error" in answer:
            raise ToolError(f"{self.name}: {answer['error']}")
        _check(self, answer["shape"], answer["spread"], request)
        seconds: float = answer["seconds"]
        return seconds

    async def stop(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, asyncio.TimeoutError):
            children = self.process.children(recursive=True)
            self._pipes.terminate()
            # asyncio waits for its own child; psutil, which would take the exit code from it, for that one's.
            await asyncio.wait_for(self._pipes.wait(), STOP_SECONDS)
            await asyncio.to_thread(_end_all, children)
        if self._pipes.returncode is None:
            self._pipes.kill()
            await self._pipes.wait()

    def _send(self, fields: dict[str, Any]) -> None:
        assert self._pipes.stdin is not None
        self._pipes.stdin.write(json.dumps(fields).encode() + b"\n")

    async def _read(self) -> None:
        assert self._pipes.stdout is not None
        async for line in self._pipes.stdout:
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"])
            if not future.done():
                future.set_result(answer)
        for future in self._waiting.values():
            if not future.done():
                future.set_result({"error": "the process has ended"})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds that loading and one image may take."""

    load: float
    image: float


async def start_server(name: str, command: Sequence[str], ready: str, log: Path, limits: Limits) -> Server:
    """Start the command with `--host` and `--port`, and wait until `ready` answers with 200. Raises ToolError."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with _log(log) as output:
        process = psutil.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | OFFLINE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        await _until_ready(name, process, url + ready, limits.load)
    except BaseException as error:
        end(process)
        if isinstance(error, ToolError):
            raise ToolError(f"{error}; {_last_line(log)}") from error
        raise
    return Server(name, process, url, log, limits.image)


async def start_worker(name: str, command: Sequence[str], options: dict[str, Any], log: Path, limits: Limits) -> Worker:
    """Start the worker's script and have it load. Raises ToolError."""
    with _log(log) as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=os.environ | OFFLINE | options.get("environment", {}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
        )
    worker = Worker(name, process, limits.image)
    try:
        await worker.load(options, limits.load)
    except BaseException as error:
        await worker.stop()
        if isinstance(error, ToolError):
            raise ToolError(f"{error}; {_last_line(log)}") from error
        raise
    return worker


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes of the process and its children: what each maps, added up, and the same with shared pages counted once."""
    infos = []
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            infos.append(each.memory_full_info())
    return sum(info.rss for info in infos), sum(info.pss for info in infos)


def end(process: psutil.Process) -> None:
    """SIGTERM, as an orchestrator does; what is still there after a while is killed, children included."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _end_all(family)


def _end_all(family: Sequence[psutil.Process]) -> None:
    _, left = psutil.wait_procs(family, STOP_SECONDS)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, STOP_SECONDS)


async def _until_ready(name: str, process: psutil.Popen, url: str, limit: float) -> None:
    deadline = time.monotonic() + limit
    async with httpx.AsyncClient(timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).status_code == httpx.codes.OK:
                    return
            if process.poll() is not None:
                raise ToolError(f"{name} ended with {process.poll()} while it started")
            if time.monotonic() > deadline:
                raise ToolError(f"{name} was not ready after {limit:,.0f} s")
            await asyncio.sleep(0.05)


def _check(target: Target, shape: Sequence[int], spread: float, request: GenerationRequest) -> None:
    """A quick answer that is no image of the size asked for is no result."""
    if tuple(shape[-3:]) != (request.height, request.width, 3) or spread == 0:
        raise ToolError(f"{target.name} drew {tuple(shape)} with a spread of {spread:.1f}")


def _failure(target: Target, error: Exception, limit: float) -> ToolError:
    if isinstance(error, (asyncio.TimeoutError, openai.APITimeoutError)):
        return ToolError(f"{target.name} took longer than {limit:,.0f} s for an image")
    return ToolError(f"{target.name}: {type(error).__name__}: {error}"[:500])


def _log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{log} ends: {lines[-1][:300]}" if lines else f"{log} is empty"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
