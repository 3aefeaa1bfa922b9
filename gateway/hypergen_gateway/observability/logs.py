"""Logging configuration: text lines, or JSON lines with request id and fields.

Applies to all loggers of the process, including uvicorn's.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal, Protocol, runtime_checkable

from hypergen_gateway.http.request_id import current_request_id, current_trace_id

LogFormat = Literal["text", "json"]
_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
# Messages for the user at the terminal, shown at any log level.
console = logging.getLogger("hypergen_gateway.console")


@runtime_checkable
class HasFields(Protocol):
    """A log message with structured fields."""

    def fields(self) -> Mapping[str, Any]:
        """The fields by name."""
        ...


class JsonLines(logging.Formatter):
    """Formats records as JSON objects, one per line, with the message's `fields` as keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. A traceback is a key, so that it stays one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            line["request_id"] = request_id
        if trace_id := current_trace_id():
            line["trace_id"] = trace_id
        if isinstance(record.msg, HasFields):
            line |= record.msg.fields()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(level: str, log_format: LogFormat) -> None:
    """Configure the loggers of the process; Python warnings are logged, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else logging.Formatter(_TEXT_FORMAT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    logging.getLogger("hypergen_gateway").setLevel(level.upper())
    console.setLevel(logging.INFO)
    console.handlers.clear()
    if log_format == "text":
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(logging.Formatter("%(message)s"))
        console.addHandler(plain)
        console.propagate = False
