"""Starting, stopping, dying and coming back."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from tritonclient.grpc import InferenceServerClient

from hypergen_gateway.serving import SAME_SIGNAL_SECONDS
from support.running_server import (
    HYPERGEN,
    KEY,
    Server,
    answers,
    free_port,
    generate,
    processes,
    shared_memory,
    start_process,
    start_server,
    stop_server,
    wait_for_server,
)


@pytest.fixture(scope="module")
def second(checkpoint: Path, cache_dir: Path) -> Iterator[Server]:
    """A server of this file alone, whose last test ends it."""
    running = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(checkpoint))
    yield running
    if running.process.poll() is None:
        stop_server(running)


@pytest.fixture
def exporting(checkpoint: Path, exported: Path) -> Iterator[tuple[Server, Callable[[], None]]]:
    """A server that waits for the export by another one, and what ends that export."""
    with (exported.parent / f".{exported.name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = free_port()
        command = [HYPERGEN, "serve", str(checkpoint), "--dtype", "float32", "--cache-dir", str(exported.parent)]
        process = start_process([*command, "--port", str(port)], {**os.environ, "HYPERGEN_API_KEY": KEY})
        server = Server(process, port, str(checkpoint))
        try:
            server.wait_until(lambda: answers(server, "/health/live"), 60, "alive")
            yield server, lambda: fcntl.flock(lock, fcntl.LOCK_UN)
        finally:
            if process.poll() is None:
                stop_server(server)


def test_what_is_asked_during_an_export_is_answered_at_once(exporting: tuple[Server, Callable[[], None]]) -> None:
    server, finish_the_export = exporting
    assert httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 503
    with server.client() as client:
        with pytest.raises(openai.InternalServerError, match="still being exported or loaded") as refusal:
            client.images.generate(prompt="cat", timeout=5)
        assert refusal.value.status_code == 503
        assert 1 < float(refusal.value.response.headers["retry-after"]) < 60
        finish_the_export()
        wait_for_server(server)
        assert client.images.generate(prompt="cat", extra_body={"num_inference_steps": 2}).data
    assert stop_server(server) == 0


def test_a_stop_during_an_export_is_heeded_at_once(exporting: tuple[Server, Callable[[], None]]) -> None:
    server, _ = exporting
    stop_server(server, timeout=10)
    assert server.process.stdout is not None
    with server.process.stdout as output:
        assert "Traceback" not in output.read()


def test_a_second_start_finds_the_export_and_is_quick(server: Server, second: Server) -> None:
    assert not any("xport" in line and "up to date" not in line for line in second.lines), second.lines
    assert second.triton_url != server.triton_url


async def test_sigterm_lets_images_finish_refuses_new_ones_and_leaves_nothing(second: Server) -> None:
    family = psutil.Process(second.process.pid).children(recursive=True)
    assert family
    assert shared_memory(second)
    async with second.async_client() as client:
        before = second.counts_of()[1]
        request = asyncio.create_task(generate(client, prompt="cat", size="128x128", num_inference_steps=150))
        while second.counts_of()[1] < before + 2:
            await asyncio.sleep(0.02)
        second.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(second.wait_until, lambda: refuses_connections(second), 60, "closed to others")
        assert not request.done()
        assert (await request).shape == (128, 128, 3)
    assert await asyncio.to_thread(second.process.wait, 30) == 0
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not shared_memory(second)


def refuses_connections(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/health/live")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # accepted just before, and closed
        return False
    return False


def test_a_closed_terminal_lets_requests_finish_and_a_second_signal_gives_them_up(
    checkpoint: Path, cache_dir: Path
) -> None:
    limits = ["--body-timeout", "600", "--dtype", "float32", "--cache-dir", str(cache_dir)]
    server = start_server(*limits, model=str(checkpoint))
    family = psutil.Process(server.process.pid).children(recursive=True)
    with socket.create_connection(("127.0.0.1", server.port)) as unfinished:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        unfinished.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: any("finishing requests" in line for line in server.lines), 10, "stopping")
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(SAME_SIGNAL_SECONDS + 0.5)
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(30) == 0
    assert any("Stopping now" in line for line in server.lines)
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not shared_memory(server)


def test_triton_does_not_outlive_a_killed_gateway(checkpoint: Path, cache_dir: Path) -> None:
    server = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(checkpoint))
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def test_another_gateway_can_use_the_triton_that_runs(server: Server) -> None:
    second = start_server("--triton-url", server.triton_url, model="", key=None)
    try:
        models = httpx.get(f"{second.url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == [server.model]
        image = httpx.post(f"{second.url}/v1/images/generations", json={"prompt": "cat"}, timeout=60)
        assert image.status_code == 200
        assert not processes(second, "triton")
    finally:
        assert stop_server(second) == 0


def test_triton_listens_on_loopback_alone(server: Server) -> None:
    (triton,) = processes(server, "tritonserver")
    listening = [each.laddr.ip for each in triton.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert listening
    # gRPC opens an IPv6 socket on the mapped address.
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_a_plain_triton_client_needs_only_a_prompt(server: Server) -> None:
    triton = InferenceServerClient(server.triton_url)
    try:
        inputs = {entry.name: entry.optional for entry in triton.get_model_config("diffusion").config.input}
        assert [name for name, optional in inputs.items() if not optional] == ["prompt"]
    finally:
        triton.close()


def test_the_key_is_never_said(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    server.wait_until(lambda: any("/v1/models" in line for line in server.lines), 10, "logging the request")
    assert not any(KEY in line for line in server.lines)
