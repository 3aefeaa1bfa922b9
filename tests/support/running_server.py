"""`hypergen serve` as a process with a real Triton, and OpenAI's clients for it."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import InferenceServerClient

from hypergen_gateway.generation.backend import GenerationRequest
from hypergen_gateway.triton.client import TritonBackend

HYPERGEN = str(Path(sys.executable).parent / "hypergen")
KEY = "a-key-for-tests"
Pixels = npt.NDArray[np.uint8]
# Images that take steps at a time.
MAX_ACTIVE = 32
# So many share each call of the images that fill the sampler; no call of a test may have a multiple of these rows.
FILLING = 8


@dataclass
class Server:
    """A running `hypergen serve`, its address and what it has said so far."""

    process: subprocess.Popen[str]
    port: int
    model: str
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def triton_url(self) -> str:
        """Where the embedded Triton listens for gRPC, as the server said at its start."""
        return self._said(r"gRPC on (\S+:\d+)")

    @property
    def metrics_url(self) -> str:
        """Where the embedded Triton has its metrics."""
        return self._said(r"gRPC on \S+, (http\S+)")

    def _said(self, pattern: str) -> str:
        for line in self.lines:
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError("\n".join(self.lines))

    def client(self, *, api_key: str = KEY, max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=max_retries)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=10).json()
        return answer

    def counts_of(self, model: str = "unet") -> tuple[int, int]:
        """Rows and executions of the UNet, or of another model, since the start, as Triton counts them."""
        statistics = self._statistics_of(model)
        return statistics.inference_count, statistics.execution_count

    def executions_by_rows(self, model: str = "unet") -> Counter[int]:
        """How often the model was called with so many rows, likewise."""
        batches = self._statistics_of(model).batch_stats
        return Counter({each.batch_size: each.compute_infer.count for each in batches})

    def seconds_in_calls(self, model: str = "unet") -> float:
        """The time of these executions, without their waits."""
        return float(self._statistics_of(model).inference_stats.compute_infer.ns) / 1e9

    def _statistics_of(self, model: str) -> Any:
        triton = InferenceServerClient(self.triton_url)
        try:
            return triton.get_inference_statistics(model, client_timeout=10).model_stats[0]
        finally:
            triton.close()

    def wait_until(self, condition: Any, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, "\n".join(["the server has ended", *self.lines])
            assert time.monotonic() < deadline, "\n".join([f"not {what} after {seconds} s", *self.lines[-30:]])
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_server(
    *arguments: str, model: str, key: str | None = KEY, ready: bool = True, environment: Mapping[str, str] | None = None
) -> Server:
    """Start `hypergen serve` and wait until it answers, and until it is ready to generate unless told otherwise."""
    port = free_port()
    process = start_process(
        [HYPERGEN, "serve", *([model] if model else []), "--host", "127.0.0.1", "--port", str(port), *arguments],
        {**os.environ, **({"HYPERGEN_API_KEY": key} if key else {}), **(environment or {})},
    )
    server = Server(process, port, model)
    wait_for_server(server, "/health/ready" if ready else "/health/live")
    return server


def start_process(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen[str]:
    """A command for `Server`, whose output is read; in this process's folder, or another."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_server(server: Server, path: str = "/health/ready") -> None:
    """Read what a server that has just been started says, and wait until `path` answers with 200; else end it."""
    threading.Thread(target=_collect, args=(server,), daemon=True).start()
    try:
        # With an export, which takes minutes on a machine that does much else.
        server.wait_until(lambda: any("Serving " in line for line in server.lines), 600, "serving")
        server.wait_until(lambda: answers(server, path), 60, "answering")
    except BaseException:
        # Nobody else knows of it. In order, as its Triton would live on with it.
        if server.process.poll() is None:
            stop_server(server)
        raise


def _collect(server: Server) -> None:
    assert server.process.stdout is not None
    with server.process.stdout as output:
        for line in output:
            server.lines.append(line.rstrip("\n"))


def answers(server: Server, path: str) -> bool:
    """Whether it does, with 200."""
    try:
        return httpx.get(server.url + path, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def stop_server(server: Server, timeout: float = 60.0) -> int:
    """End it as an orchestrator does, and return its exit code."""
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(timeout)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise


def processes(server: Server, name: str) -> list[psutil.Process]:
    """Those that the server has started, whose name begins so."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if child.is_running() and child.name().startswith(name)]


def model_process(server: Server, model: str) -> psutil.Process:
    """The one in which Triton runs a model."""
    (found,) = [each for each in processes(server, "triton_python") if f"/{model}/1/" in " ".join(each.cmdline())]
    return found


def shared_memory(server: Server) -> list[Path]:
    """The regions of this server's Triton: they are named after the process that started it."""
    return list(Path("/dev/shm").glob(f"hypergen-triton-{server.process.pid}-*"))


def samples_of(exposition: str, prefix: str) -> dict[str, float]:
    """The samples of metrics whose name begins with `prefix`, by the rest of the name and the labels in order."""
    samples = {}
    for family in text_string_to_metric_families(exposition):
        for name, labels, value, *_ in family.samples:
            if name.startswith(prefix) and not name.endswith("_created"):
                told = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
                samples[name.removeprefix(prefix) + (f"{{{told}}}" if told else "")] = value
    return samples


def images_in_the_sampler(server: Server) -> float:
    """Those that take steps or wait for a place among them, as its Triton's metrics say."""
    samples = samples_of(httpx.get(server.metrics_url, timeout=10).text, "hypergen_sampler_")
    return samples["active_images"] + samples["waiting_images"]


@asynccontextmanager
async def long_requests(
    server: Server, number: int, **fields: Any
) -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    """So many requests in the sampler, which take far longer than any test needs them; afterwards they are gone.

    By httpx: the work of OpenAI's client, which counts its retries, goes on for some time without it.
    """
    body = {"prompt": "cat", "size": "256x256", "num_inference_steps": 150, **fields}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300) as client:
        requests = [asyncio.create_task(client.post("/v1/images/generations", json=body)) for _ in range(number)]
        try:
            images = number * body.get("n", 1)
            await asyncio.to_thread(server.wait_until, lambda: images_in_the_sampler(server) == images, 60, "at work")
            yield requests
        finally:
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
    await asyncio.to_thread(server.wait_until, lambda: images_in_the_sampler(server) == 0, 60, "idle")


def pixels_of(image: Any) -> Pixels:
    """The pixels of one item of a response's `data`."""
    with Image.open(io.BytesIO(base64.b64decode(image.b64_json))) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


async def generate(client: openai.AsyncOpenAI, **fields: Any) -> Pixels:
    """One image; what OpenAI's client does not know goes into the body as it is."""
    known = {name: fields.pop(name) for name in ("prompt", "size", "n") if name in fields}
    response = await client.images.generate(**known, extra_body=fields)
    assert response.data is not None
    return pixels_of(response.data[0])


async def generate_all(server: Server, bodies: list[dict[str, Any]]) -> list[Pixels]:
    """All of them at once, each on a request of its own."""
    async with server.async_client() as client:
        return await asyncio.gather(*(generate(client, **fields) for fields in bodies))


async def generate_together(
    server: Server, requests: Sequence[Coroutine[Any, Any, Pixels]], model: str = "unet"
) -> tuple[list[Pixels], Counter[int]]:
    """Their images, all from one first step on, and how often the denoiser was called for them with so many rows.

    They wait in a full sampler until all have come, as otherwise it would be chance which of them meet.
    """
    # Some checkpoints' own schedulers take few steps.
    async with _full_sampler(server, scheduler="ddim" if model == "unet" else None):
        waiting = asyncio.gather(*requests)
        until_they_wait = functools.partial(server.wait_until, seconds=60, what="waiting")
        await asyncio.to_thread(until_they_wait, lambda: images_in_the_sampler(server) == MAX_ACTIVE + len(requests))
        before = server.executions_by_rows(model)
    images = await waiting
    executions = server.executions_by_rows(model) - before
    return images, Counter({rows: count for rows, count in executions.items() if rows % FILLING})


@asynccontextmanager
async def _full_sampler(server: Server, scheduler: str | None) -> AsyncIterator[None]:
    """Within the context, by images that bypass the gateway; then they are cancelled together."""
    backend = TritonBackend(server.triton_url)
    generation = GenerationRequest(
        prompt="cat",
        num_images=FILLING,
        width=128,
        height=128,
        num_inference_steps=150,
        guidance_scale=1.0,
        scheduler=scheduler,
        seed=1,
    )

    async def work() -> None:
        async with aclosing(backend.generate(generation)) as images:
            async for _ in images:
                raise AssertionError("an image was finished before the others were waiting")

    working = [asyncio.create_task(work()) for _ in range(MAX_ACTIVE // FILLING)]
    try:
        await asyncio.to_thread(server.wait_until, lambda: images_in_the_sampler(server) == MAX_ACTIVE, 60, "at work")
        yield
    finally:
        for each in working:
            each.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await backend.close()
