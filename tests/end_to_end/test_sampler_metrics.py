"""What the sampler adds to Triton's metrics, seen where Prometheus would look."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.server import Launch, TritonServer, free_ports
from support.plain_triton import ask, responses
from support.running_server import Server

# Eight of them take far longer than any wait for the metrics.
LONG: dict[str, Any] = {"prompt": "cat", "width": 256, "height": 256, "num_inference_steps": 150, "scheduler": "ddim"}


def metrics_of(server: Server) -> dict[str, float]:
    """The sampler's own, without their common beginning."""
    text = httpx.get(server.metrics_url, timeout=10).text
    pairs = re.findall(r"^hypergen_sampler_(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in pairs}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after if name.endswith("_total")}


def test_rows_calls_and_steps_are_counted(server: Server) -> None:
    before = metrics_of(server)
    ask(server.triton_url, prompt="cat", num_images=2, num_inference_steps=6, guidance_scale=3.0, scheduler="ddim")
    ask(server.triton_url, prompt="cat", num_inference_steps=6, guidance_scale=1.0, scheduler="ddim")
    # Guided from the fourth step on: three rows and three pairs of them.
    ask(
        server.triton_url, prompt="cat", num_inference_steps=6, guidance_scale=3.0, guidance_start=0.5, scheduler="ddim"
    )
    after = metrics_of(server)
    print(after)
    counted = grown(before, after)
    assert 0 < counted.pop("unet_seconds_total") < 60
    assert counted == {"unet_calls_total": 18, "unet_rows_total": 39, "steps_total": 24, "saved_steps_total": 0}
    assert after["unet_max_rows"] == 16  # eight images of two rows, as the fixture exports it


def test_running_images_are_counted_and_so_are_the_steps_that_a_disconnect_saves(server: Server) -> None:
    before = metrics_of(server)
    stream = responses(server.triton_url, **LONG, num_images=8, partial_images=3)
    next(stream)
    server.wait_until(lambda: metrics_of(server)["active_images"] == 8, 30, "at work")
    assert metrics_of(server)["waiting_images"] == 0
    stream.close()
    server.wait_until(lambda: metrics_of(server)["active_images"] == 0, 30, "idle")
    counted = grown(before, metrics_of(server))
    print(counted)
    assert counted["saved_steps_total"] > 0
    assert counted["steps_total"] + counted["saved_steps_total"] == 8 * 150


def test_the_processes_of_all_models_end_by_themselves(exported: Path, tmp_path: Path) -> None:
    """The sampler's crashed, as it still had its metrics, and what was left of a cancelled request."""
    installation = find_installation()
    statuses, stub = tmp_path / "statuses", tmp_path / "triton_python_backend_stub"
    # Triton first tries whether it can be run at all, without arguments.
    stub.write_text(f'#!/bin/sh\n{installation.stub} "$@"\nstatus=$?\n[ $# = 0 ] || echo $status >> {statuses}\n')
    stub.chmod(0o755)

    ports = free_ports()

    async def start_and_stop() -> None:
        server = await TritonServer.start(Launch(replace(installation, stub=stub), exported, ports))
        try:
            await server.wait_ready(120)
            await asyncio.to_thread(leave_early, f"127.0.0.1:{ports.grpc}")
        finally:
            await server.stop(60)

    asyncio.run(start_and_stop())
    models = [file.parent for file in exported.glob("*/config.pbtxt")]
    ended = statuses.read_text().split()
    assert len(ended) == len(models)
    # On a busy machine Triton may leave first, after its --exit-timeout-secs, which ends a process with 1.
    assert set(ended) <= {"0", "1"}


def leave_early(url: str) -> None:
    """Cancel a request, and return when the sampler has noticed."""
    stream = responses(url, **LONG, partial_images=3)
    next(stream)
    stream.close()
    ask(url, prompt="cat", num_inference_steps=2)
