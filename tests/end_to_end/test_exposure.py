"""What of a running server can be reached from where."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tritonclient.grpc import InferenceServerClient, InferenceServerException

from support.running_server import KEY, Server


@pytest.fixture
def triton(server: Server) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(server.triton_url)
    yield client
    client.close()


def family_of(server: Server) -> list[psutil.Process]:
    """The gateway's process, Triton's and those of its models."""
    gateway = psutil.Process(server.process.pid)
    return [gateway, *gateway.children(recursive=True)]


def test_only_the_gateway_s_port_is_where_the_user_put_it_and_all_else_on_loopback(server: Server) -> None:
    family = family_of(server)
    assert {process.name()[:12] for process in family} >= {"hypergen", "tritonserver", "triton_pytho"}
    listening = {
        connection.laddr
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type != 1
    }
    others = {address for address in listening if address.port != server.port}
    assert len(listening) == len(others) + 1
    ports = {address.port for address in others}
    assert {int(server.triton_url.rpartition(":")[2])} < ports  # gRPC and metrics
    assert len(ports) == 2
    assert all(ipaddress.ip_address(address.ip.removeprefix("::ffff:")).is_loopback for address in others)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("register_system_shared_memory", ("mine", "/hypergen-triton", 64)),
        ("get_system_shared_memory_status", ()),
        ("unregister_system_shared_memory", ()),
        ("register_cuda_shared_memory", ("mine", b"aGFuZGxl", 0, 64)),
        ("get_model_repository_index", ()),
        ("load_model", ("unet",)),
        ("unload_model", ("unet",)),
        ("update_trace_settings", (None, {"trace_file": "/tmp/anywhere"})),
        ("update_log_settings", ({"log_file": "/tmp/anywhere"},)),
    ],
)
def test_other_users_of_the_machine_cannot_change_triton_or_map_its_memory(
    server: Server, triton: InferenceServerClient, call: str, arguments: tuple[Any, ...]
) -> None:
    for headers in (None, {"triton-grpc-protocol-nobody": "never"}):
        with pytest.raises(InferenceServerException, match="restricted"):
            getattr(triton, call)(*arguments, headers=headers, client_timeout=10)
    assert server.health()["status"] == "healthy"


def test_what_they_see_of_its_processes_holds_no_key(server: Server) -> None:
    """Command lines are everybody's; environments are those of the same user and of root."""
    gateway, *others = family_of(server)
    for process in (gateway, *others):
        assert not [word for word in process.cmdline() if KEY in word]
    assert gateway.environ()["HYPERGEN_API_KEY"] == KEY
    for process in others:
        assert KEY not in process.environ().values()
    assert not [path for path in Path("/tmp").glob("hypergen-triton-*") if path.stat().st_mode & 0o077]
