"""What docker/ expects of Triton, seen on a running one."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import httpx
import pytest

from support.running_server import Server, generate, long_requests

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
    async with long_requests(server, 3):
        assert scaled_by(server) == 3
    assert scaled_by(server) == 0


def scaled_by(server: Server) -> float:
    """What prometheus-adapter.yaml sums up of this Triton."""
    exposed = httpx.get(server.metrics_url).text
    counts = re.findall(r"^hypergen_sampler_(?:active|waiting)_images(?:\{.*\})? (\S+)$", exposed, re.MULTILINE)
    assert len(counts) == 2, exposed
    return sum(map(float, counts))


@pytest.mark.claim("drain")
async def test_a_drain_lasts_until_the_image_is_there(server: Server) -> None:
    executions = server.counts_of()[1]
    async with server.async_client() as client:
        request = asyncio.create_task(generate(client, prompt="a cat", size="128x128", num_inference_steps=150))
        while server.counts_of()[1] == executions:
            await asyncio.sleep(0.02)
        options = ["--metrics-url", server.metrics_url, "--limit", "100"]
        drain = await asyncio.create_subprocess_exec(sys.executable, str(DOCKER / "triton" / "drain.py"), *options)
        assert not request.done()
        assert await drain.wait() == 0
        assert request.done()
        assert (await request).shape == (128, 128, 3)
