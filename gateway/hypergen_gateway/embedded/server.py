"""One run of the tritonserver process: its command line, environment, log, readiness and end.

Knows one process from start to stop; what happens when it dies is the supervisor's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from hypergen_gateway.embedded.environment import absolute_folders, child_environment
from hypergen_gateway.embedded.errors import EmbeddedError, ModelsNotLoadedError
from hypergen_gateway.embedded.installation import Installation
from hypergen_gateway.embedded.processes import die_with_parent
from hypergen_gateway.embedded.run_folder import RunFolder
from hypergen_gateway.embedded.watchdog import IDLE_SHARE, LinuxProcess
from hypergen_gateway.triton.client import CHANNEL_ARGS

logger = logging.getLogger(__name__)

STUB_NAME = "triton_python_backend_stub"
LOG_LEVELS = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.ERROR}
# Said at every start on a machine without a GPU, or each time a stream ends with an error of the sampler's: no news.
HARMLESS = (
    "CudaDriverHelper has not been initialized",
    "Unable to allocate pinned system memory",
    "failed to allocate pinned system memory",
    "HandleCancellation called even when the context was not cancelled",
)
# What the environment may hold for us alone.
SECRETS = frozenset(
    {"HYPERGEN_API_KEY", "HYPERGEN_LINK_SECRET", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
)
# Of Triton's gRPC, what nobody here needs: by these calls a user of this machine could read its models' memory, load
# other models or write files where it may. They want a header that no gRPC client can send, as its name has capitals.
CLOSED_PROTOCOLS = "--grpc-restricted-protocol=shared-memory,model-repository,trace,logging:Nobody=never"
# While it loads models Triton does not hear SIGTERM, and nobody waits for it yet.
LOADING_STOP_SECONDS = 0.5
# Stubs end by themselves once their server has gone.
MODELS_STOP_SECONDS = 3.0
READY_CALL_SECONDS = 2.0
STANDSTILL_SECONDS = 20
CLOSE_SECONDS = 1.0


@dataclass(frozen=True)
class Ports:
    """Loopback ports of one server."""

    grpc: int
    metrics: int


def free_ports() -> Ports:
    """Two ports that nobody listens on at this moment."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return Ports(first.getsockname()[1], second.getsockname()[1])


def trace_options(environment: Mapping[str, str]) -> list[str]:
    """What makes Triton send its spans of requests that come with a trace to where the gateway sends its own."""
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    url = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (base and f"{base}/v1/traces")
    if not url:
        return []
    settings = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={url}"]
    return [f"--trace-config={each}" for each in [*settings, "opentelemetry,resource=service.name=hypergen-triton"]]


@dataclass(frozen=True)
class Launch:
    """Everything that a start of the server needs, the same at every restart."""

    installation: Installation
    model_repository: Path
    ports: Ports

    def command(self, folder: RunFolder) -> list[str]:
        """The command line; gRPC and metrics on loopback alone."""
        return [
            str(self.installation.server),
            f"--model-repository={folder.models}",
            f"--backend-directory={folder.backends}",
            f"--cache-directory={self.installation.caches}",
            "--allow-http=false",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.ports.grpc}",
            CLOSED_PROTOCOLS,
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.ports.metrics}",
            "--allow-gpu-metrics=false",
            "--disable-auto-complete-config",
            # The sampler answers in flight from one thread each: see its BLS_THREADS.
            "--backend-config=python,thread-pool-size=64",
            f"--backend-config=python,shm-region-prefix-name={folder.name}",
            "--exit-timeout-secs=5",
            *trace_options(os.environ),
        ]

    def environment(self, folder: RunFolder) -> dict[str, str]:
        """Ours without its secrets, with Triton's libraries and a Python first that finds our packages."""
        ours = child_environment({name: value for name, value in os.environ.items() if name not in SECRETS})
        # Where nobody knows the user's home, as in a container with a user of its own, packages want one nevertheless.
        return (
            {"HOME": str(folder.path)}
            | ours
            | {
                "LD_LIBRARY_PATH": _search_path(*folder.libraries, *absolute_folders(ours.get("LD_LIBRARY_PATH", ""))),
                "PATH": _search_path(folder.programs, Path(sys.executable).parent, *absolute_folders(ours["PATH"])),
                # Several processes share the cores: threads that spin while they wait would take them from the UNet.
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        )


def _search_path(*folders: Path | str) -> str:
    return os.pathsep.join(map(str, folders))


class TritonServer:
    """A running tritonserver process and its model processes."""

    def __init__(self, launch: Launch, folder: RunFolder, process: asyncio.subprocess.Process) -> None:
        self._launch = launch
        self._folder = folder
        self._process = process
        self._last_lines: deque[str] = deque(maxlen=200)
        self._reader = asyncio.create_task(self._read_log())
        self._models: list[psutil.Process] = []
        self._stopping = False

    @classmethod
    async def start(cls, launch: Launch) -> TritonServer:
        """Start the process in a folder of its own, without waiting for its models.

        Raises:
            EmbeddedError: the folder cannot be made, or no process can be started.
        """
        folder = RunFolder.make(launch.installation, launch.model_repository)
        try:
            environment = launch.environment(folder)
            _check_shell(environment["PATH"])
            process = await asyncio.create_subprocess_exec(
                *launch.command(folder),
                env=environment,
                # Python's search for modules begins in the current folder: here nobody has put any.
                cwd=folder.path,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Its own session, so that Ctrl-C reaches us alone and we stop it in order; and it must not outlive us.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except (OSError, RuntimeError) as error:  # the latter where no thread can be started that waits for it
            folder.remove()
            raise EmbeddedError(f"Triton cannot be started: {error}.") from error
        except BaseException:
            folder.remove()
            raise
        return cls(launch, folder, process)

    async def wait_ready(self, timeout: float) -> None:
        """Wait until every model is loaded.

        Raises:
            EmbeddedError: it exited, a model's process ended unasked, or `timeout` seconds passed.
        """
        deadline = time.monotonic() + timeout
        watch = _StartWatch(self._process.pid)
        async with triton_client(f"127.0.0.1:{self._launch.ports.grpc}") as client:
            while not await answers(client.is_server_ready, READY_CALL_SECONDS):
                # Triton makes it readable for everybody, whatever the umask; prompts and images will lie there.
                self._folder.close_shared_memory()
                await self._check_start(watch)
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"Triton was not ready after {timeout:.0f} s: {self._reason()}")
                await asyncio.sleep(0.1)
        self._folder.close_shared_memory()
        self._models = _stubs_of(self._process.pid)

    async def _check_start(self, watch: _StartWatch) -> None:
        if self._process.returncode is not None:
            # A model's process that hangs would keep its output open.
            await asyncio.wait([self._reader], timeout=MODELS_STOP_SECONDS)
            code = self._process.returncode
            raise ModelsNotLoadedError(f"Triton exited with code {code} at start: {self._reason()}")
        if fault := watch.look():
            raise EmbeddedError(f"{fault}: {self._reason()}")

    def missing(self) -> str | None:
        """What has died since the server was ready, in words; None while all is alive."""
        if self._process.returncode is not None:
            return f"tritonserver (exit code {self._process.returncode})"
        dead = [model for model in self._models if not _is_alive(model)]
        return f"{len(dead)} of its {len(self._models)} model processes" if dead else None

    def processes(self) -> list[LinuxProcess]:
        """What the watchdog looks at once the server is ready: the server itself, then its models."""
        models = [LinuxProcess(model.pid, _name_of(model)) for model in self._models]
        return [LinuxProcess(self._process.pid, "tritonserver"), *models]

    async def stop(self, timeout: float) -> None:
        """Ask it to end, and kill what has not ended after `timeout` seconds, or at once when cancelled."""
        models = _stubs_of(self._process.pid) or self._models
        self._stopping = True
        try:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), timeout if self._models else LOADING_STOP_SECONDS)
            await _wait_until_ended(models, MODELS_STOP_SECONDS)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End it and everything it has started at once; it leads a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            ended = asyncio.ensure_future(self._process.wait())
            await asyncio.wait([ended, self._reader], timeout=MODELS_STOP_SECONDS)
        finally:
            self._folder.remove()

    async def _read_log(self) -> None:
        assert self._process.stdout is not None
        while raw := await _read_line(self._process.stdout):
            line = raw.decode("utf-8", "replace").rstrip()
            if line:
                self._last_lines.append(line)
                # That large models take longer to unload than Triton waits for them concerns nobody: it ends anyway.
                logger.log(logging.DEBUG if self._stopping else log_level_of(line), "%s", line)

    def _reason(self) -> str:
        """On one line: the first error that Triton logged, if possible one that names a model; or the last words."""
        errors = [line for line in self._last_lines if log_level_of(line) >= logging.ERROR]
        errors.sort(key=lambda line: "failed to load '" not in line)
        others = [line for line in self._last_lines if not _is_of_triton(line)]
        words = errors or (others or list(self._last_lines))[-1:] or ["it said nothing"]
        message = words[0].partition("] ")[2].strip('"') if _is_of_triton(words[0]) else words[0].strip()
        return self._folder.plain(message.partition("\\n\\nAt:")[0])


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """The next line; one longer than the buffer comes in pieces instead of ending the reading."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as overrun:
        return await stream.read(overrun.consumed)


def log_level_of(line: str) -> int:
    """The weight that Triton gave a line of its own, unless it says nothing new; others come from its models."""
    if any(words in line for words in HARMLESS) or not _is_of_triton(line):
        return logging.DEBUG
    return LOG_LEVELS.get(line[0], logging.DEBUG)


def _is_of_triton(line: str) -> bool:
    """Whether it looks like `I1123 11:55:42.123456 42 file.cc:1] "message"`."""
    return line[1:5].isdigit() and "] " in line


@contextlib.asynccontextmanager
async def triton_client(url: str) -> AsyncIterator[InferenceServerClient]:
    """A client of the server on this machine, asked directly whatever proxy the environment names."""
    client = InferenceServerClient(url, channel_args=CHANNEL_ARGS)
    try:
        yield client
    finally:
        # A library that could not start its threads does not answer either.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.close(), CLOSE_SECONDS)


async def answers(call: Callable[..., Awaitable[bool]], seconds: float) -> bool:
    """Whether the server says yes in time."""
    try:
        return bool(await asyncio.wait_for(call(client_timeout=seconds), seconds + CLOSE_SECONDS))
    except (InferenceServerException, asyncio.TimeoutError):
        return False


def _check_shell(path: str) -> None:
    if shutil.which("bash", path=path) is None:
        raise EmbeddedError("bash is not installed, or not on PATH, which Triton starts its models' processes with.")


class _StartWatch:
    """Notices a start that will never end, by looks a second apart.

    Triton waits for ever for the first words of a model's process, even of one that has ended; and for its own threads,
    even if none could be started.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._next_look = time.monotonic()
        self._ended: set[int] = set()
        self._cpu: dict[int, float] = {}
        self._idle_looks = 0

    def look(self) -> str | None:
        """What has happened, in words; None while there may be progress."""
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + 1.0
        children = _children_of(self._pid, recursive=True)
        before, self._ended = self._ended, {child.pid for child in children if _is_zombie(child)}
        if before & self._ended:  # nor has anybody taken note of it meanwhile
            return "A model's process ended as soon as Triton started it"
        self._idle_looks = self._idle_looks + 1 if self._is_idle([self._pid, *(each.pid for each in children)]) else 0
        if self._idle_looks >= STANDSTILL_SECONDS:
            return f"Triton has done nothing for {STANDSTILL_SECONDS} s of its start"
        return None

    def _is_idle(self, pids: Sequence[int]) -> bool:
        """Whether none of them has worked since the last look, nor wants to."""
        processes = [LinuxProcess(pid, "") for pid in pids]
        before, self._cpu = self._cpu, {process.pid: process.cpu_seconds() for process in processes}
        used = sum(cpu - before.get(pid, 0.0) for pid, cpu in self._cpu.items())
        return used < IDLE_SHARE and not any(process.wants_to_run() for process in processes)


async def _wait_until_ended(processes: Sequence[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_is_alive(process) for process in processes):
            return
        await asyncio.sleep(0.02)


def _children_of(pid: int, recursive: bool = False) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=recursive))
    except psutil.NoSuchProcess:
        return []


def _stubs_of(pid: int) -> list[psutil.Process]:
    return [child for child in _children_of(pid, recursive=True) if child.name()[:15] == STUB_NAME[:15]]


def _name_of(stub: psutil.Process) -> str:
    """A stub's first argument is its model's file, MODEL/1/model.py or the like."""
    try:
        return f"the process of {Path(stub.cmdline()[1]).parents[1].name}"
    except (psutil.NoSuchProcess, IndexError):
        return "a model's process"


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and not _is_zombie(process)
    except psutil.NoSuchProcess:
        return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
