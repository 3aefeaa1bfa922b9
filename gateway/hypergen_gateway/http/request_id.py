"""The id of the request being served and its place in a trace, for whoever logs or passes them on without being handed
the request.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TypeAlias

# As ASGI gives them, names in lower case.
RawHeaders: TypeAlias = Iterable[tuple[bytes, bytes]]

# Empty outside a request.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")

# The W3C headers by which a trace goes on from here, `traceparent` and `tracestate`; empty where there is no trace.
current_trace: ContextVar[Mapping[str, str]] = ContextVar("current_trace", default=MappingProxyType({}))

_TRACE_PARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACE_STATE = re.compile(r"[\x20-\x7e]{1,512}")

# What a client may choose: enough for uuids and traces, nothing that could forge a line in a log.
_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def accept_or_create(candidate: str | None) -> str:
    """The client's own id if it is a sane one, else a new one."""
    if candidate is not None and _SANE.fullmatch(candidate):
        return candidate
    return f"req_{secrets.token_hex(16)}"


def read_trace(headers: RawHeaders) -> Mapping[str, str]:
    """The trace that a client's request belongs to, in well-formed headers; empty if it names none."""
    parent = find_header(headers, b"traceparent")
    if parent is None or not _TRACE_PARENT.fullmatch(parent):
        return {}
    state = find_header(headers, b"tracestate") or ""
    return {"traceparent": parent} | ({"tracestate": state} if _TRACE_STATE.fullmatch(state) else {})


def find_header(headers: RawHeaders, name: bytes) -> str | None:
    """The first of that name. Every request comes by here, most of them without it."""
    for each, value in headers:
        if each == name:
            return value.decode("latin-1")
    return None


def current_trace_id() -> str:
    """The id of the current trace, for logs; empty if there is none."""
    return current_trace.get().get("traceparent", "--").split("-")[1]
