"""Follows a file of weights that is replaced while its model is served, such as a rank pool for LoRAs.

The model is compiled again beside the one that serves, so no request waits or is lost. A file beside the weights says
which of them are served: whoever replaces them waits for it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.3
# What could not be read is tried again after this time.
RETRY_SECONDS = 10.0
logger = logging.getLogger(__name__)


class WeightsFollower:
    """Calls `read_again`, which raises an error if it fails, whenever `file` has been replaced.

    `served` is the version that was there before the model was read.
    """

    def __init__(self, file: Path, served: str, read_again: Callable[[], None]) -> None:
        self._file = file
        self._read_again = read_again
        self._served = served
        self._stopped = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._follow, name="weights", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        seconds = POLL_SECONDS
        while not self._stopped.wait(seconds):
            seconds = POLL_SECONDS
            try:
                found = version(self._file)
                if found != self._served:
                    self._read_again()
                    self._served = found
                    self._tell()
            except Exception:  # whatever it is, the file is followed on
                logger.exception("%s cannot be read again; the earlier weights are served", self._file)
                seconds = RETRY_SECONDS

    def _tell(self) -> None:
        new = self._file.with_name(f".{self._file.name}.served.new")
        new.write_text(self._served)
        new.replace(served_file(self._file))


def version(file: Path) -> str:
    """Identifies a file's content, as files are replaced, not written in place. Raises OSError."""
    status = os.stat(file)  # noqa: PTH116 - one call
    return f"{status.st_ino}-{status.st_mtime_ns}"


def served_file(file: Path) -> Path:
    """The file that says which version is served."""
    return file.with_name(f"{file.name}.served")
