"""Keeps an embedded Triton running: starts it, notices when it or one of its processes dies or hangs, starts it again.

Triton 2.51 stays "ready" after a model's process has crashed, and that model's clients wait for ever: so the processes
themselves are watched, and the whole server is replaced, on the same ports, so that clients find it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.run_folder import remove_abandoned
from hypergen_gateway.embedded.server import Launch, TritonServer, answers, free_ports, triton_client
from hypergen_gateway.embedded.watchdog import LOOK_SECONDS, PROBE_SECONDS, Watchdog

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
PROBE_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


@asynccontextmanager
async def embedded_triton(model_repository: Path, start_timeout: float = 600.0) -> AsyncIterator[EmbeddedTriton]:
    """Serve `model_repository` for as long as the context lasts; every model is ready when it is entered.

    Raises:
        EmbeddedError: Triton cannot be found, started or made ready within `start_timeout` seconds.
    """
    installation = find_installation()
    remove_abandoned()
    triton = EmbeddedTriton(Launch(installation, model_repository, free_ports()), start_timeout)
    try:
        await triton.start()
        yield triton
    finally:
        await triton.stop()


class EmbeddedTriton:
    """A Triton that is started again when it or one of its processes dies or hangs; made by `embedded_triton`.

    `at_work` says whether somebody waits for Triton, who sets it; then it also hangs if none of its processes works.
    """

    def __init__(self, launch: Launch, start_timeout: float) -> None:
        self._launch = launch
        self._start_timeout = start_timeout
        self._server: TritonServer | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.at_work: Callable[[], bool] = lambda: False

    @property
    def url(self) -> str:
        """HOST:PORT of gRPC; the same across restarts."""
        return f"127.0.0.1:{self._launch.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """Triton's own Prometheus metrics."""
        return f"http://127.0.0.1:{self._launch.ports.metrics}/metrics"

    async def start(self) -> None:
        """Start, wait until ready, and watch from then on."""
        self._watcher = asyncio.create_task(self._watch(await self._start_server()))

    async def stop(self) -> None:
        """End the watch and the server; also after a failed start."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._server is not None:
            await self._server.stop(STOP_SECONDS)

    async def _start_server(self) -> TritonServer:
        self._server = await TritonServer.start(self._launch)
        await self._server.wait_ready(self._start_timeout)
        return self._server

    async def _watch(self, server: TritonServer) -> None:
        while True:
            fault = await self._fault_of(server)
            logger.error("Triton %s; starting it again", fault)
            server = await self._replace()

    async def _fault_of(self, server: TritonServer) -> str:
        """What has happened to the server, in words, as soon as something has."""
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
            probing.cancel()
            await asyncio.wait([probing])

    async def _replace(self) -> TritonServer:
        """Start again until it holds, with growing pauses: a full disk or short memory may pass."""
        pause = 0.5
        while True:
            try:
                # What is left of it could only fail its clients later.
                if self._server is not None:
                    await self._server.kill()
                    self._server = None
                server = await self._start_server()
            except (EmbeddedError, OSError) as error:
                logger.error("%s Next try in %.0f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            else:
                logger.warning("Triton is back")
                return server


async def _probe(url: str, watchdog: Watchdog) -> None:
    """Ask the server again and again whether it lives."""
    async with triton_client(url) as client:
        while True:
            watchdog.probed(answered=await answers(client.is_server_live, PROBE_SECONDS))
            await asyncio.sleep(PROBE_PAUSE_SECONDS)
