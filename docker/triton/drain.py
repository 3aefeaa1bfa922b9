#!/usr/bin/env python3
"""Wait until Triton has finished its images; run before Triton is stopped.

Once it is stopping, Triton fails the next call of every image in progress. The sampler calls the denoiser at every
step, so Triton is idle when its count of executions does not change. Uses Triton's metrics only.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import urllib.request

POLL_SECONDS = 0.5
# This machine's Triton, whatever http_proxy says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
EXECUTIONS = re.compile(r"^nv_inference_exec_count\{[^}]*\} (\S+)$", re.MULTILINE)


def main() -> int:
    """Exit code 0: Triton is idle or has stopped. 1: images were still being generated at the limit."""
    options = parser().parse_args()
    # Clients may still open streams on old connections until they no longer resolve to this server.
    time.sleep(options.announce)
    deadline = time.monotonic() + options.limit
    last, since = executions(options.metrics_url), time.monotonic()
    while last is not None and time.monotonic() - since < options.quiet:
        if time.monotonic() > deadline:
            print(f"drain: images were still being generated after {options.limit:.0f} s", file=sys.stderr)
            return 1
        time.sleep(POLL_SECONDS)
        count = executions(options.metrics_url)
        if count != last:
            last, since = count, time.monotonic()
    return 0


def parser() -> argparse.ArgumentParser:
    """The command-line options."""
    options = argparse.ArgumentParser(description="Wait until Triton has finished its images.")
    options.add_argument("--metrics-url", default="http://127.0.0.1:8002/metrics")
    options.add_argument("--announce", type=float, default=0.0, help="seconds until clients no longer know this server")
    options.add_argument("--quiet", type=float, default=5.0, help="seconds without an execution that count as idle")
    options.add_argument("--limit", type=float, default=240.0, help="seconds to wait after --announce")
    return options


def executions(url: str) -> float | None:
    """Executions of all models since Triton's start; None if it does not answer."""
    try:
        with DIRECT.open(url, timeout=2) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    return sum(float(count) for count in EXECUTIONS.findall(text))


if __name__ == "__main__":
    sys.exit(main())
