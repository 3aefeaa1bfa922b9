"""Starting, stopping, dying and coming back."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tritonclient.grpc import InferenceServerClient

from hypergen_gateway.serving import SAME_SIGNAL_SECONDS
from support.running_server import KEY, Server, generate, processes, shared_memory, start_server, stop_server


@pytest.fixture(scope="module")
def second(checkpoint: Path, cache_dir: Path) -> Iterator[Server]:
    """A server of this file alone, whose last test ends it."""
    running = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(checkpoint))
    yield running
    if running.process.poll() is None:
        stop_server(running)


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
