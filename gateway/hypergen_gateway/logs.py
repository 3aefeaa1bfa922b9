"""Lines for people and lines for machines.

Knows how a line looks: as text, or as one JSON object with the request's id and what was told about it. Every logger of
the process is written alike, uvicorn's too.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, Literal

from hypergen_gateway.request_id import current_request_id, current_trace_id

LogFormat = Literal["text", "json"]
# What a user at a terminal is told; shown whatever the level.
console = logging.getLogger("hypergen_gateway.console")


class JsonLines(logging.Formatter):
    """One JSON object per line. A record's `fields`, given as `extra`, are keys beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; an exception is a key of it, so that it stays one."""
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
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(level: str, log_format: LogFormat) -> None:
    """Sets up the process's loggers; warnings of Python's become lines, too."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
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
