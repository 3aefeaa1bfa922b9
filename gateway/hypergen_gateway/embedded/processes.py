"""What every child process does before it begins."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have Linux send this process a SIGTERM when its parent ends in whatever way."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
