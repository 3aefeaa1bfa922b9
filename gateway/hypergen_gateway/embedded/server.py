"""One run of the tritonserver process: command line, environment, log, readiness and shutdown.

Restarts are the job of `supervisor`.
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

from hypergen_gateway.concurrency import run_with_timeout
from hypergen_gateway.embedded.environment import absolute_folders, child_environment
from hypergen_gateway.embedded.errors import EmbeddedError, ModelsNotLoadedError, TritonCrashedError
from hypergen_gateway.embedded.installation import Installation
from hypergen_gateway.embedded.processes import dying_with_parent
from hypergen_gateway.embedded.run_folder import RunFolder
from hypergen_gateway.embedded.watchdog import IDLE_SHARE, LinuxProcess
from hypergen_gateway.triton.client import CHANNEL_ARGS

logger = logging.getLogger(__name__)

STUB_NAME = "triton_python_backend_stub"
LOG_LEVELS = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.ERROR}
# Logged at every start without a GPU, or whenever a stream ends with an error of the sampler: not a problem.
HARMLESS = (
    "CudaDriverHelper has not been initialized",
    "Unable to allocate pinned system memory",
    "failed to allocate pinned system memory",
    "HandleCancellation called even when the context was not cancelled",
    "encountered epoll_wait error: Bad file descriptor",  # gRPC's, while Triton forks a model's process
    "epoll_ctl failed: Bad file descriptor",  # the same
)
# Environment variables that Triton and its models must not see.
SECRETS = frozenset(
    {"HYPERGEN_API_KEY", "HYPERGEN_LINK_SECRET", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
)
# gRPC calls that are not needed and would let users of this machine read the models' memory, load other models or write
# files. They require a header that no gRPC client can send, as its name has capitals.
CLOSED_PROTOCOLS = "--grpc-restricted-protocol=shared-memory,model-repository,trace,logging:Nobody=never"
# Triton ignores SIGTERM while it loads models, and has no requests yet.
LOADING_STOP_SECONDS = 0.5
# Stubs exit by themselves after their server.
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
    """Two currently unused ports."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return Ports(first.getsockname()[1], second.getsockname()[1])


def trace_options(environment: Mapping[str, str]) -> list[str]:
    """Options for Triton to export spans to the gateway's endpoint, for requests with a trace context."""
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    url = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (base and f"{base}/v1/traces")
    if not url:
        return []
    settings = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={url}"]
    return [f"--trace-config={each}" for each in [*settings, "opentelemetry,resource=service.name=hypergen-triton"]]


@dataclass(frozen=True)
class Launch:
    """Parameters of the server, the same for every restart."""

    installation: Installation
    model_repository: Path
    ports: Ports

    def command(self, folder: RunFolder) -> list[str]:
        """The command line. gRPC and metrics listen on loopback only."""
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
            # The sampler uses a thread per running call: see its BLS_THREADS.
            "--backend-config=python,thread-pool-size=64",
            f"--backend-config=python,shm-region-prefix-name={folder.name}",
            "--exit-timeout-secs=5",
            *trace_options(os.environ),
        ]

    def environment(self, folder: RunFolder) -> dict[str, str]:
        """This process's environment without secrets, with Triton's libraries and the run folder's Python first."""
        inherited = child_environment({name: value for name, value in os.environ.items() if name not in SECRETS})
        # Packages need a home folder even for users without one, such as an unknown uid in a container.
        return (
            {"HOME": str(folder.path)}
            | inherited
            | {
                "LD_LIBRARY_PATH": _search_path(
                    *folder.libraries, *absolute_folders(inherited.get("LD_LIBRARY_PATH", ""))
                ),
                "PATH": _search_path(
                    folder.programs, Path(sys.executable).parent, *absolute_folders(inherited["PATH"])
                ),
                # Several processes share the cores: spinning threads would take them from the denoiser.
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
        """Start the process in a new run folder, without waiting for its models.

        Raises:
            EmbeddedError: the folder cannot be created, or the process cannot be started.
        """
        folder = RunFolder.make(launch.installation, launch.model_repository)
        try:
            environment = launch.environment(folder)
            if shutil.which("bash", path=environment["PATH"]) is None:
                raise EmbeddedError("Triton needs bash to start its models' processes, and it is not on PATH.")
            process = await asyncio.create_subprocess_exec(
                *dying_with_parent(*launch.command(folder)),
                env=environment,
                # Python searches the current folder for modules first; this one contains none.
                cwd=folder.path,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # A separate session, so that Ctrl-C reaches only this process, which stops Triton in order.
                start_new_session=True,
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started to wait for it
            folder.remove()
            raise EmbeddedError(f"Triton cannot be started: {error}.") from error
        except BaseException:
            folder.remove()
            raise
        return cls(launch, folder, process)

    async def wait_ready(self, timeout: float) -> None:
        """Wait until every model is loaded.

        Raises:
            EmbeddedError: Triton or a model's process exited, startup has stalled, or `timeout` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        monitor = StartupMonitor(self._process.pid)
        async with triton_client(f"127.0.0.1:{self._launch.ports.grpc}") as client:
            while not await answers(client.is_server_ready, READY_CALL_SECONDS):
                # Triton creates it world-readable regardless of the umask; it will contain prompts and images.
                self._folder.close_shared_memory()
                await self._check_startup(monitor)
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"Triton was not ready after {timeout:.0f} s: {self._reason()}")
                await asyncio.sleep(0.1)
        self._folder.close_shared_memory()
        self._models = _stubs_of(self._process.pid)

    async def _check_startup(self, monitor: StartupMonitor) -> None:
        if self._process.returncode is not None:
            # A hanging model process would keep the output open.
            await asyncio.wait([self._reader], timeout=MODELS_STOP_SECONDS)
            code = self._process.returncode
            kind = TritonCrashedError if code < 0 else ModelsNotLoadedError
            raise kind(f"Triton exited with code {code} at start: {self._reason()}")
        if fault := monitor.check():
            raise EmbeddedError(f"{fault}: {self._reason()}")

    def missing(self) -> str | None:
        """A description of the processes that have died since the server was ready; None if there are none."""
        if self._process.returncode is not None:
            return f"tritonserver (exit code {self._process.returncode})"
        dead = [model for model in self._models if not _is_alive(model)]
        return f"{len(dead)} of its {len(self._models)} model processes" if dead else None

    def processes(self) -> list[LinuxProcess]:
        """The processes for the watchdog: the server, then its models."""
        models = [LinuxProcess(model.pid, _name_of(model)) for model in self._models]
        return [LinuxProcess(self._process.pid, "tritonserver"), *models]

    async def stop(self, timeout: float) -> None:
        """Stop the server; kill it after `timeout` seconds, or at once when cancelled."""
        models = _stubs_of(self._process.pid) or self._models
        self._stopping = True
        try:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await run_with_timeout(self._process.wait(), timeout if self._models else LOADING_STOP_SECONDS)
            await _wait_until_ended(models, MODELS_STOP_SECONDS)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Kill the server and its child processes, which are in one session."""
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
                # During shutdown, warnings about models that unload slowly do not matter.
                logger.log(logging.DEBUG if self._stopping else log_level_of(line), "%s", line)

    def _reason(self) -> str:
        """One line: the first error in Triton's log, preferably one that names a model, or else the last line."""
        errors = [line for line in self._last_lines if log_level_of(line) >= logging.ERROR]
        errors.sort(key=lambda line: "failed to load '" not in line)
        others = [line for line in self._last_lines if not _is_triton_log(line)]
        words = errors or (others or list(self._last_lines))[-1:] or ["no output"]
        message = words[0].partition("] ")[2].strip('"') if _is_triton_log(words[0]) else words[0].strip()
        return self._folder.restore_paths(message.partition("\\n\\nAt:")[0])


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """The next line; a line longer than the buffer is returned in pieces."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as overrun:
        return await stream.read(overrun.consumed)


def log_level_of(line: str) -> int:
    """The level of a line of Triton's log; debug for harmless ones and the output of models."""
    if any(words in line for words in HARMLESS) or not _is_triton_log(line):
        return logging.DEBUG
    return LOG_LEVELS.get(line[0], logging.DEBUG)


def _is_triton_log(line: str) -> bool:
    """Whether a line has Triton's format, `I1123 11:55:42.123456 42 file.cc:1] "message"`."""
    return line[1:5].isdigit() and "] " in line


@contextlib.asynccontextmanager
async def triton_client(url: str) -> AsyncIterator[InferenceServerClient]:
    """A gRPC client of the local server, which ignores proxy settings."""
    client = InferenceServerClient(url, channel_args=CHANNEL_ARGS)
    try:
        yield client
    finally:
        # Closing hangs if the library could not start its threads.
        with contextlib.suppress(TimeoutError):
            await run_with_timeout(client.close(), CLOSE_SECONDS)


async def answers(call: Callable[..., Awaitable[bool]], seconds: float) -> bool:
    """Whether a call returns true within `seconds`."""
    try:
        return bool(await run_with_timeout(call(client_timeout=seconds), seconds + CLOSE_SECONDS))
    except (InferenceServerException, TimeoutError):
        return False


class StartupMonitor:
    """Detects a start that will never finish, with a check every second.

    Triton waits forever for the first message of a model's process, even if the process has exited, and for its own
    threads, even if they could not be started.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._next_check = time.monotonic()
        self._ended: set[int] = set()
        self._cpu: dict[int, float] = {}
        self._idle_checks = 0

    def check(self) -> str | None:
        """A description of the failure; None while there may be progress."""
        if time.monotonic() < self._next_check:
            return None
        self._next_check = time.monotonic() + 1.0
        children = _children_of(self._pid, recursive=True)
        before, self._ended = self._ended, {child.pid for child in children if _is_zombie(child)}
        if before & self._ended:  # Triton has not reaped it in the meantime
            return "A model's process ended as soon as Triton started it"
        self._idle_checks = self._idle_checks + 1 if self._is_idle([self._pid, *(each.pid for each in children)]) else 0
        if self._idle_checks >= STANDSTILL_SECONDS:
            return f"Triton has done nothing for {STANDSTILL_SECONDS} s of its start"
        return None

    def _is_idle(self, pids: Sequence[int]) -> bool:
        """Whether no process has used the CPU since the last check, nor is runnable."""
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
    """A description of a stub by its model. Its first argument is the model's file, such as MODEL/1/model.py."""
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
