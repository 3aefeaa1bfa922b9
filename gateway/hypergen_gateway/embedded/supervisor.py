"""Supervisor of the embedded Triton: restarts it when it or one of its model processes dies or hangs.

Triton 2.51 stays "ready" after a model's process has crashed, and requests to that model wait forever. So the processes
are watched, and the whole server is restarted on the same ports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hypergen_gateway.concurrency import cancel
from hypergen_gateway.embedded.errors import EmbeddedError, TritonCrashedError
from hypergen_gateway.embedded.installation import Installation, find_installation
from hypergen_gateway.embedded.run_folder import check_shared_memory, remove_abandoned
from hypergen_gateway.embedded.server import Launch, TritonServer, answers, free_ports, triton_client
from hypergen_gateway.embedded.watchdog import LOOK_SECONDS, PROBE_SECONDS, Watchdog

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
PROBE_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


@asynccontextmanager
async def embedded_triton(model_repository: Path, start_timeout: float = 600.0) -> AsyncIterator[EmbeddedTriton]:
    """Run a Triton that serves `model_repository` within the context; all models are ready on entry.

    Raises:
        EmbeddedError: Triton cannot be found, started or made ready within `start_timeout` seconds.
    """
    installation = prepare_machine()
    triton = EmbeddedTriton(Launch(installation, model_repository, free_ports()), start_timeout)
    try:
        await triton.start()
        yield triton
    finally:
        await triton.stop()


def prepare_machine() -> Installation:
    """Remove what killed gateways left behind, and return the Triton that can be started.

    Raises:
        EmbeddedError: Triton is not installed, or there is too little shared memory.
    """
    installation = find_installation()
    remove_abandoned()
    check_shared_memory()
    return installation


class EmbeddedTriton:
    """A Triton that is restarted when it or one of its processes dies or hangs; created by `embedded_triton`.

    `at_work` is set by the user and returns whether requests are running; if so, idle processes count as hanging.
    """

    def __init__(self, launch: Launch, start_timeout: float) -> None:
        self._launch = launch
        self._start_timeout = start_timeout
        self._server: TritonServer | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.at_work: Callable[[], bool] = lambda: False

    @property
    def repository(self) -> Path:
        """The folder of the models."""
        return self._launch.model_repository

    @property
    def url(self) -> str:
        """HOST:PORT of gRPC, which does not change across restarts."""
        return f"127.0.0.1:{self._launch.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """URL of Triton's Prometheus metrics."""
        return f"http://127.0.0.1:{self._launch.ports.metrics}/metrics"

    async def start(self) -> None:
        """Start Triton, wait until it is ready, and begin to watch it."""
        try:
            server = await self._start_server()
        except TritonCrashedError as error:
            # On an overloaded machine it aborts if a model's process holds a lock of theirs for ten seconds.
            logger.warning("%s; starting it once more", error)
            await self._kill_server()
            server = await self._start_server()
        self._watcher = asyncio.create_task(self._watch(server))

    async def stop(self) -> None:
        """Stop watching and stop the server; also after a failed start."""
        try:
            if self._watcher is not None:
                await cancel(self._watcher)
        finally:
            if self._server is not None:
                await self._server.stop(STOP_SECONDS)

    async def _start_server(self) -> TritonServer:
        self._server = await TritonServer.start(self._launch)
        await self._server.wait_ready(self._start_timeout)
        return self._server

    async def _kill_server(self) -> None:
        if self._server is not None:
            await self._server.kill()
            self._server = None

    async def _watch(self, server: TritonServer) -> None:
        while True:
            fault = await self._fault_of(server)
            logger.error("Triton %s; restarting it", fault)
            server = await self._replace()

    async def _fault_of(self, server: TritonServer) -> str:
        """Wait for a fault of the server, and return its description."""
        watchdog = Watchdog(server.processes(), at_work=lambda: self.at_work())
        probing = asyncio.create_task(_probe(self.url, watchdog))
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                if missing := server.missing():
                    return f"lost {missing}"
                if hanging := watchdog.look():
                    return f"hangs: {hanging}"
        finally:
            await cancel(probing)

    async def _replace(self) -> TritonServer:
        """Restart, retrying with growing pauses: a full disk or a lack of memory may be temporary."""
        pause = 0.5
        while True:
            try:
                # Its remaining processes could not serve requests correctly.
                await self._kill_server()
                server = await self._start_server()
            except (EmbeddedError, OSError) as error:
                logger.error("%s Retrying in %.0f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            else:
                logger.warning("Triton has restarted")
                return server


async def _probe(url: str, watchdog: Watchdog) -> None:
    """Probe the server's liveness repeatedly."""
    async with triton_client(url) as client:
        while True:
            watchdog.probed(answered=await answers(client.is_server_live, PROBE_SECONDS))
            await asyncio.sleep(PROBE_PAUSE_SECONDS)
