"""Lines for people and lines for machines.

Knows how a line looks: as text, or as one JSON object with the request's id and what was told about it. Every logger of
the process is written alike, uvicorn's too.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal, Protocol, runtime_checkable

from hypergen_gateway.http.request_id import current_request_id, current_trace_id

LogFormat = Literal["text", "json"]
# What a user at a terminal is told; shown whatever the level.
console = logging.getLogger("hypergen_gateway.console")


@runtime_checkable
class HasFields(Protocol):
    """A message that is more than its text."""

    def fields(self) -> Mapping[str, Any]:
        """What it says, by name."""
        ...


class JsonLines(logging.Formatter):
    """One JSON object per line. What a message has as `fields` are keys beside it."""

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
        if isinstance(record.msg, HasFields):
            line |= record.msg.fields()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """The lines that Python's own formatter makes of `FORMAT`, sooner: there is one for every request."""

    FORMAT = "%(asctime)s %(levelname)-7s %(message)s"

    def __init__(self) -> None:
        super().__init__(self.FORMAT)
        self._second = (-1, "")

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback follows it."""
        if record.exc_info or record.exc_text or record.stack_info:
            return super().format(record)
        return f"{self._time_of(record)},{int(record.msecs):03d} {record.levelname:<7} {record.getMessage()}"

    def _time_of(self, record: logging.LogRecord) -> str:
        """Local time; its text is made once a second."""
        second = int(record.created)
        if self._second[0] != second:
            self._second = (second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second)))
        return self._second[1]


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no arguments for it
    """Standard error, which Python flushes after every line by itself."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def flush(self) -> None:
        """Nothing is left to be flushed."""


def set_up_logging(level: str, log_format: LogFormat) -> None:
    """Sets up the process's loggers; warnings of Python's become lines, too."""
    handler = _Stderr()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    # No line names these, and every record would look them up: see "Optimization" in Python's logging HOWTO.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("hypergen_gateway").setLevel(level.upper())
    console.setLevel(logging.INFO)
    console.handlers.clear()
    if log_format == "text":
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(logging.Formatter("%(message)s"))
        console.addHandler(plain)
        console.propagate = False
