"""Setup of child processes."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have Linux send this process a SIGTERM when its parent ends for any reason."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
