"""A TCP relay that passes every byte on as it came, and keeps the requests as clients put them on the wire."""

from __future__ import annotations

import email
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import h11


@dataclass(frozen=True, kw_only=True)
class WireRequest:
    """One request; `fields` are those of its JSON or its form, `files` the names of the form's files."""

    method: str
    target: str
    headers: dict[str, str]
    fields: dict[str, Any]
    files: frozenset[str]


@dataclass
class Relay:
    """`said` has the bytes of each connection from the client's side."""

    upstream: tuple[str, int]
    port: int = 0
    said: list[bytearray] = field(default_factory=list)

    def requests(self) -> list[WireRequest]:
        """All that have come since the start, of each connection in order."""
        return [request for connection in self.said for request in parse(bytes(connection))]

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.upstream)
            said = bytearray()
            self.said.append(said)
            threading.Thread(target=connect, args=(client, server, said), daemon=True).start()


def connect(client: socket.socket, server: socket.socket, said: bytearray) -> None:
    """Pass on what both say until both have ended."""
    with client, server:
        back = threading.Thread(target=pass_on, args=(server, client, None), daemon=True)
        back.start()
        pass_on(client, server, said)
        back.join()


def pass_on(source: socket.socket, target: socket.socket, record: bytearray | None) -> None:
    """Until the source ends or is lost; the end is passed on, too."""
    try:
        while data := source.recv(65536):
            if record is not None:
                record += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # so that the other direction ends, too


@contextmanager
def relay_to(host: str, port: int) -> Iterator[Relay]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay((host, port), listener.getsockname()[1])
        threading.Thread(target=relay.serve, args=(listener,), daemon=True).start()
        yield relay
        listener.shutdown(socket.SHUT_RDWR)


def parse(said: bytes) -> Iterator[WireRequest]:
    """The whole requests that a connection begins with. h11 stops after each that asks for another protocol."""
    while said:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(said)
        events = []
        with suppress(h11.RemoteProtocolError):
            while isinstance(event := connection.next_event(), (h11.Request, h11.Data, h11.EndOfMessage)):
                events.append(event)
        if not events or not isinstance(events[-1], h11.EndOfMessage):
            return
        yield wire_request(events)
        said, _ = connection.trailing_data


def wire_request(events: Sequence[h11.Event]) -> WireRequest:
    request = events[0]
    assert isinstance(request, h11.Request)
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in request.headers}
    body = b"".join(event.data for event in events if isinstance(event, h11.Data))
    fields, files = contents(headers.get("content-type", ""), body)
    return WireRequest(
        method=request.method.decode(), target=request.target.decode(), headers=headers, fields=fields, files=files
    )


def contents(content_type: str, body: bytes) -> tuple[dict[str, Any], frozenset[str]]:
    """The fields and the names of the files in a body of JSON or a form."""
    if content_type.startswith("application/json"):
        return dict(json.loads(body)), frozenset()
    if not content_type.startswith("multipart/"):
        return {}, frozenset()
    form: Any = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    fields, files = {}, set()
    for part in form.get_payload():
        name = str(part.get_param("name", header="content-disposition"))
        if part.get_filename() is None:
            fields[name] = part.get_payload(decode=True).decode()
        else:
            files.add(name)
    return fields, frozenset(files)
