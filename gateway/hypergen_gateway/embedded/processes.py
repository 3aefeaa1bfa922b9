"""Setup of child processes."""

from __future__ import annotations

import os
import sys

# PR_SET_PDEATHSIG is 1. It survives the exec; a parent that has ended before it was set is noticed by its id.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(parent):
    sys.exit(1)
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"{command[0]}: {error.strerror}")
"""


def dying_with_parent(*command: str) -> list[str]:
    """The command of a child process to which Linux sends a SIGTERM when this process ends for any reason.

    The child sets that up itself before it becomes `command`. A `preexec_fn` would run between fork and exec: forked
    while other threads were in calls of gRPC, one child in six crashed there (tests/gateway/embedded/test_processes.py
    measures it). Without one, Python uses vfork, which runs nothing of gRPC's in the child.
    """
    return [sys.executable, "-IS", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def module_command(name: str) -> list[str]:
    """`python -m NAME` without the current folder, which Python would search for modules first: it may be a checkpoint.

    Python 3.10 has no option for that.
    """
    code = (
        "import sys; sys.path[:] = filter(None, sys.path); "
        f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code]
