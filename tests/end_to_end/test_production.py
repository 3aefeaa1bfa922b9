"""What docker/ expects of Triton, seen on a running one."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path

import httpx
import pytest

from support.running_server import KEY, Server, draw

DOCKER = Path(__file__).parents[2] / "docker"
# Triton has these where it finds a GPU: docs/user_guide/metrics.md of its sources.
METRIC = r"(?:nv|hypergen)_\w+"
GPU_METRICS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage"}


@pytest.mark.claim("metrics")
def test_triton_has_every_metric_and_label_that_dashboard_and_rules_ask_for(server: Server) -> None:
    dashboard = json.loads((DOCKER / "observability/grafana/dashboards/triton.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    rules = (DOCKER / "observability" / "rules.yaml").read_text()
    exposed = httpx.get(server.metrics_url).text
    there = set(re.findall(rf"^({METRIC})", exposed, re.MULTILINE)) | GPU_METRICS
    assert set(re.findall(METRIC, queries + rules)) <= there
    models = set(re.findall(r'model!?="(\w+)"', queries))
    assert models == {"diffusion", "unet", "vae_decoder"}
    assert models <= set(re.findall(r'^nv_inference_count{model="(\w+)"', exposed, re.MULTILINE))
    assert re.search(r'^nv_inference_request_failure{model="unet",reason="\w+"', exposed, re.MULTILINE)


@pytest.mark.claim("scaling")
async def test_the_gauges_that_replicas_are_scaled_by_count_the_images_in_the_sampler(server: Server) -> None:
    # Far longer than the gauges take to be written anew, and ended as soon as they were.
    wish = {"prompt": "a cat", "size": "256x256", "num_inference_steps": 150}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:
        drawing = [asyncio.create_task(client.post("/v1/images/generations", json=wish)) for _ in range(3)]
        try:
            deadline = time.monotonic() + 60
            while images_in_the_sampler(server) != len(drawing):
                assert time.monotonic() < deadline, f"{images_in_the_sampler(server)} images in the sampler"
                await asyncio.sleep(0.05)
        finally:
            for request in drawing:
                request.cancel()
            await asyncio.gather(*drawing, return_exceptions=True)
    server.wait_until(lambda: images_in_the_sampler(server) == 0, 10, "counted as idle")


def images_in_the_sampler(server: Server) -> float:
    """What prometheus-adapter.yaml sums up of this Triton."""
    exposed = httpx.get(server.metrics_url).text
    counts = re.findall(r"^hypergen_sampler_(?:active|waiting)_images(?:\{.*\})? (\S+)$", exposed, re.MULTILINE)
    assert len(counts) == 2, exposed
    return sum(map(float, counts))


@pytest.mark.claim("drain")
async def test_a_drain_lasts_until_the_picture_is_there(server: Server) -> None:
    executions = server.unet_counts()[1]
    async with server.async_client() as client:
        drawing = asyncio.create_task(draw(client, prompt="a cat", size="128x128", num_inference_steps=150))
        while server.unet_counts()[1] == executions:
            await asyncio.sleep(0.02)
        options = ["--metrics-url", server.metrics_url, "--quiet", "2", "--limit", "100"]
        drain = await asyncio.create_subprocess_exec(sys.executable, str(DOCKER / "triton" / "drain.py"), *options)
        assert not drawing.done()
        assert await drain.wait() == 0
        assert drawing.done()
        assert (await drawing).shape == (128, 128, 3)
