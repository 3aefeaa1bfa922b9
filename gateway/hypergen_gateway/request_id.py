"""The id of the request being served, for whoever logs or passes it on without being handed the request."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

# Empty outside a request.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")

# What a client may choose: enough for uuids and traces, nothing that could forge a line in a log.
_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def accept_or_create(candidate: str | None) -> str:
    """The client's own id if it is a sane one, else a new one."""
    if candidate is not None and _SANE.fullmatch(candidate):
        return candidate
    return f"req_{uuid.uuid4().hex}"
