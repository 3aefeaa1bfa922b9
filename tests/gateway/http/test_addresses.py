"""Where the gateway listens, how that is printed, and which addresses of Triton gRPC would understand."""

from __future__ import annotations

import socket

import pytest

from hypergen_gateway.http.addresses import PortUnavailableError, is_grpc_address, listening, url_of
from support.running_server import free_port

has_ipv6 = socket.has_ipv6 and socket.has_dualstack_ipv6()
needs_ipv6 = pytest.mark.skipif(not has_ipv6, reason="this machine has no IPv6")


def reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "[::]"])
def test_every_address_of_ipv6_is_every_address_of_ipv4_too(host: str) -> None:
    port = free_port()
    with listening(host, port):
        assert reaches("127.0.0.1", port)
        assert reaches("::1", port)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_one_address_of_ipv6_is_that_alone(host: str) -> None:
    port = free_port()
    with listening(host, port):
        assert reaches("::1", port)
        assert not reaches("127.0.0.1", port)


def test_a_name_is_all_of_its_addresses() -> None:
    port = free_port()
    named = {str(found[4][0]) for found in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
    with listening("localhost", port) as sockets:
        assert {each.getsockname()[0] for each in sockets} == named
        assert all(reaches(address, port) for address in named)
    assert not any(reaches(address, port) for address in named)


def test_a_name_one_of_whose_addresses_is_not_here_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*stream, ("192.0.2.1", port)), (*stream, ("127.0.0.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listening("both.example", port) as sockets:
        assert [each.getsockname() for each in sockets] == [("127.0.0.1", port)]


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("192.0.2.1", "Cannot listen on 192.0.2.1:8000 (Cannot assign requested address)"),
        ("2001:db8::1", "Cannot listen on 2001:db8::1:8000 ("),
        ("no.such.host.invalid", "Cannot listen on no.such.host.invalid:8000 ("),
        ("..", "Cannot listen on ..:8000 ("),
        ("a" * 70, ":8000 ("),
        ("http://localhost", "Cannot listen on http://localhost:8000 ("),
    ],
)
def test_a_host_that_is_not_here_is_one_line_that_names_the_option(host: str, says: str) -> None:
    with pytest.raises(PortUnavailableError) as raised, listening(host, 8000):
        pass
    assert says in str(raised.value)
    assert str(raised.value).endswith(": see --host and --port.")
    assert "\n" not in str(raised.value)


def test_a_port_that_is_taken_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortUnavailableError, match="in use"), listening("localhost", port):
            pass
        assert not reaches("::1", port)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://localhost:8000"),
        ("::", "http://localhost:8000"),
        ("[::]", "http://localhost:8000"),
        ("::1", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:8000"),
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("images.example.com", "http://images.example.com:8000"),
    ],
)
def test_a_printed_url_can_be_opened(host: str, url: str) -> None:
    assert url_of(host, 8000) == url


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8001",
        "triton:8001",
        "triton.internal:65535",
        "[::1]:8001",
        "[fe80::1%eth0]:8001",
        "dns:triton:8001",
        "dns:///hypergen-triton.default.svc:8001",
        "dns://10.0.0.2:53/triton:8001",
        "ipv4:10.0.0.1:8001,10.0.0.2:8001",
        "ipv6:[::1]:8001,[::2]:8001",
        "unix:/run/triton.sock",
        "unix:///run/triton.sock",
    ],
)
def test_what_grpc_understands_is_taken(address: str) -> None:
    assert is_grpc_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8001",
        "https://triton:8001",
        "grpc://triton:8001",
        "tcp://10.0.0.1:8001",
        "triton",
        "127.0.0.1",
        "triton:",
        ":8001",
        "triton:0",
        "triton:65536",
        "triton:http",
        "triton:8001/",
        "triton:8001/v2",
        "a:8001,b:8001",
        "::1:8001",
        "[::1]",
        "dns:///triton",
        "ipv4:10.0.0.1:8001,10.0.0.2",
        " triton:8001",
        "user@triton:8001",
    ],
)
def test_what_grpc_would_misread_is_not(address: str) -> None:
    assert not is_grpc_address(address)
