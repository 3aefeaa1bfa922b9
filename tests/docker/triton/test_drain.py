"""The wait before Triton is stopped, against metrics as Triton writes them. Against Triton itself: tests/end_to_end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.claim("drain")

DRAIN = Path(__file__).parents[3] / "docker" / "triton" / "drain.py"
METRICS = """# HELP nv_inference_exec_count Number of model executions performed
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{{model="unet",version="1"}} {count}
nv_inference_exec_count{{model="diffusion",version="1"}} 3
nv_inference_count{{model="unet",version="1"}} 99
"""


@contextmanager
def generating(until: float) -> Iterator[str]:
    """A server whose count of executions grows with every look until that time; gives the metrics' address."""
    count = 0

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal count
            count += time.monotonic() < until
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.format(count=count).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is not a log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()


def drain(url: str, *options: str, **environment: str) -> tuple[int, str]:
    """Exit code and what it says."""
    command = [sys.executable, str(DRAIN), "--metrics-url", url, *options]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_it_waits_until_no_model_is_executed_any_more() -> None:
    until = time.monotonic() + 1
    with generating(until) as url:
        assert drain(url, "--quiet", "0.6") == (0, "")
    assert time.monotonic() > until + 0.6


def test_it_first_lets_clients_go_elsewhere() -> None:
    began = time.monotonic()
    with generating(began) as url:
        assert drain(url, "--announce", "0.5", "--quiet", "0.5") == (0, "")
    assert time.monotonic() - began > 1


def test_it_gives_up_at_its_limit_and_says_so() -> None:
    with generating(time.monotonic() + 60) as url:
        code, said = drain(url, "--quiet", "2", "--limit", "1")
    assert code == 1
    assert said == "drain: images were still being generated after 1 s\n"


def test_nobody_there_is_nothing_to_wait_for() -> None:
    with generating(0) as url:
        pass
    assert drain(url) == (0, "")


def test_triton_is_not_asked_through_a_proxy() -> None:
    with generating(time.monotonic() + 60) as url:
        code, _ = drain(url, "--quiet", "1", "--limit", "0.5", http_proxy="http://127.0.0.1:9")
    assert code == 1
