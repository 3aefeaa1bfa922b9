"""What docker/ expects of Triton, seen on a running one."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import httpx

from running_server import Server, draw

DOCKER = Path(__file__).parents[2] / "docker"
# Triton has these where it finds a GPU: docs/user_guide/metrics.md of its sources.
GPU_METRICS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage"}


def test_triton_has_every_metric_and_label_that_the_dashboard_asks_for(server: Server) -> None:
    dashboard = json.loads((DOCKER / "observability/grafana/dashboards/triton.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    exposed = httpx.get(server.metrics_url).text
    assert set(re.findall(r"nv_\w+", queries)) <= set(re.findall(r"^nv_\w+", exposed, re.MULTILINE)) | GPU_METRICS
    models = set(re.findall(r'model!?="(\w+)"', queries))
    assert models == {"diffusion", "unet", "vae_decoder"}
    assert models <= set(re.findall(r'^nv_inference_count{model="(\w+)"', exposed, re.MULTILINE))
    assert re.search(r'^nv_inference_request_failure{model="unet",reason="\w+"', exposed, re.MULTILINE)


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
