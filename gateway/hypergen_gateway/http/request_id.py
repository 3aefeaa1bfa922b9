"""Request id and trace context of the current request, as context variables for code that does not have the request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TypeAlias

# ASGI headers, with lower-case names.
RawHeaders: TypeAlias = Iterable[tuple[bytes, bytes]]

# Empty outside a request.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")

# The W3C trace context headers, `traceparent` and `tracestate`; empty without a trace.
current_trace: ContextVar[Mapping[str, str]] = ContextVar("current_trace", default=MappingProxyType({}))

_TRACE_PARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACE_STATE = re.compile(r"[\x20-\x7e]{1,512}")

# Accepted request ids: enough for UUIDs and trace ids, and safe in a log line.
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def accept_or_create(candidate: str | None) -> str:
    """The client's request id if valid, else a new one."""
    if candidate is not None and _VALID_ID.fullmatch(candidate):
        return candidate
    return f"req_{secrets.token_hex(16)}"


def read_trace(headers: RawHeaders) -> Mapping[str, str]:
    """The trace context headers of a request; empty if missing or malformed."""
    parent = find_header(headers, b"traceparent")
    if parent is None or not _TRACE_PARENT.fullmatch(parent):
        return {}
    state = find_header(headers, b"tracestate") or ""
    return {"traceparent": parent} | ({"tracestate": state} if _TRACE_STATE.fullmatch(state) else {})


def find_header(headers: RawHeaders, name: bytes) -> str | None:
    """The first header named `name`; None if there is none."""
    for each, value in headers:
        if each == name:
            return value.decode("latin-1")
    return None


def current_trace_id() -> str:
    """The id of the current trace; empty if there is none."""
    return current_trace.get().get("traceparent", "--").split("-")[1]
