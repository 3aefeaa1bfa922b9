"""Addresses given on the command line: listening sockets, URLs and gRPC targets."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterator

from hypergen_gateway.http.body_timeout import set_tcp_user_timeout

_WILDCARDS = frozenset({"0.0.0.0", "::"})
# Errors of address families that this machine lacks, in which a name such as localhost may have addresses.
_UNSUPPORTED = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s/:,@\[\]]+):([0-9]{1,5})")
# Name syntax of gRPC: https://github.com/grpc/grpc/blob/master/doc/naming.md
_DNS = re.compile(r"dns:(?://[^/]*/)?")
_LIST_PREFIXES = ("ipv4:", "ipv6:")
_LOCAL_PREFIXES = ("unix:", "unix-abstract:")


class PortUnavailableError(Exception):
    """Listening on the address failed; `str()` is the message for the user."""


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listening sockets on all addresses of `host`, a name or an address; `::` includes IPv4.

    Raises:
        PortUnavailableError: the host is unknown or not this machine, or the port is in use.
    """
    with contextlib.ExitStack() as opened:
        try:
            sockets = [opened.enter_context(each) for each in _listen(host.removeprefix("[").removesuffix("]"), port)]
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid name, such as ".."
            # socket appends the address to the operating system's message.
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            raise PortUnavailableError(f"Cannot listen on {host}:{port} ({reason}): see --host and --port.") from error
        yield sockets


def _listen(host: str, port: int) -> Iterator[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys((family, address) for family, *_, address in found)
    missing: OSError | None = None
    listened = False
    for family, address in addresses:
        is_dual = address[0] == "::" and socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server(address, family=family, dualstack_ipv6=is_dual)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            missing = error
            continue
        # asyncio does this for its own sockets. Without it, the end of a response waits 40 ms for the client's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_tcp_user_timeout(listener)
        listened = True
        yield listener
    if missing is not None and not listened:
        raise missing


def url_of(host: str, port: int) -> str:
    """The URL of a server that listens on `host`, as seen from the same machine."""
    host = host.removeprefix("[").removesuffix("]")
    if host in _WILDCARDS:
        return f"http://localhost:{port}"
    return f"http://[{host.replace('%', '%25')}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_grpc_address(text: str) -> bool:
    """Whether `text` is a valid gRPC target with explicit ports."""
    if text.startswith(_LOCAL_PREFIXES):
        return True
    prefix = next((each for each in _LIST_PREFIXES if text.startswith(each)), None)
    endpoints = [_DNS.sub("", text, count=1)] if prefix is None else text.removeprefix(prefix).split(",")
    return all(_is_host_and_port(each) for each in endpoints)


def _is_host_and_port(text: str) -> bool:
    match = _HOST_AND_PORT.fullmatch(text)
    return match is not None and 1 <= int(match[1]) <= 65535
