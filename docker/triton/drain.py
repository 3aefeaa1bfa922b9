#!/usr/bin/env python3
"""Waits until Triton has nothing left to do; run before Triton is told to stop.

From the moment it is told, Triton fails the next call of every picture under way. The step loop calls the UNet at
every step, so a Triton whose count of executions stands still draws nothing. Knows Triton's metrics alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import urllib.request

POLL_SECONDS = 0.5
EXECUTIONS = re.compile(r"^nv_inference_exec_count\{[^}]*\} (\S+)$", re.MULTILINE)


def main() -> int:
    """Exit code 0: nothing is under way, or nobody is there any more. 1: pictures were still drawn at the limit."""
    options = parser().parse_args()
    # Until then clients may still open streams, on connections from before this server left their list.
    time.sleep(options.announce)
    deadline = time.monotonic() + options.limit
    last, since = executions(options.metrics_url), time.monotonic()
    while last is not None and time.monotonic() - since < options.quiet:
        if time.monotonic() > deadline:
            print(f"drain: pictures were still drawn after {options.limit:.0f} s", file=sys.stderr)
            return 1
        time.sleep(POLL_SECONDS)
        count = executions(options.metrics_url)
        if count != last:
            last, since = count, time.monotonic()
    return 0


def parser() -> argparse.ArgumentParser:
    """The options: seconds, and where the metrics are."""
    options = argparse.ArgumentParser(description="Wait until Triton has nothing left to do.")
    options.add_argument("--metrics-url", default="http://127.0.0.1:8002/metrics")
    options.add_argument("--announce", type=float, default=0.0, help="seconds until no client knows this server")
    options.add_argument("--quiet", type=float, default=5.0, help="seconds without an execution that mean idle")
    options.add_argument("--limit", type=float, default=240.0, help="seconds after announce until it gives up")
    return options


def executions(url: str) -> float | None:
    """How often any model was executed since the start; None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    return sum(float(count) for count in EXECUTIONS.findall(text))


if __name__ == "__main__":
    sys.exit(main())
