"""Two real Tritons behind one gateway, as on Kubernetes behind one name; one of them is killed under load."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.running_server import Server, generate, generate_all, start_server, stop_server

BODIES = [{"prompt": "cat", "seed": seed, "num_inference_steps": 100, "size": "96x96"} for seed in range(16)]


@pytest.fixture
def second(checkpoint: Path, cache_dir: Path) -> Iterator[Server]:
    running = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(checkpoint))
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


@pytest.fixture
def gateway(server: Server, second: Server) -> Iterator[Server]:
    both = f"ipv4:{server.triton_url},{second.triton_url}"
    running = start_server("--triton-url", both, model="")
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


def executions(*servers: Server) -> list[int]:
    return [server.counts_of()[1] for server in servers]


@pytest.mark.claim("replicas")
async def test_a_triton_killed_under_load_takes_no_request_with_it(
    server: Server, second: Server, gateway: Server
) -> None:
    expected = await generate_all(server, BODIES)
    before = executions(server, second)
    async with gateway.async_client() as client:
        began = time.monotonic()
        requests = [asyncio.create_task(generate(client, **fields)) for fields in BODIES]
        while any(now <= then for now, then in zip(executions(server, second), before, strict=True)):
            await asyncio.sleep(0.02)
        (victim,) = [
            child
            for child in psutil.Process(second.process.pid).children(recursive=True)
            if child.name() == "tritonserver"
        ]
        unfinished = sum(not request.done() for request in requests)
        victim.send_signal(signal.SIGKILL)
        images = await asyncio.gather(*requests)
        took = time.monotonic() - began
    # The client asks once: a request that failed would have raised.
    whole = sum(np.array_equal(image, wanted) for image, wanted in zip(images, expected, strict=True))
    again = sum("sending it to Triton again" in line for line in gateway.lines)
    print(
        f"{len(BODIES)} requests, {unfinished} under way when one of two Tritons was killed: {again} asked again of "
        f"the other, {len(BODIES) - whole} lost, all done in {took:.1f} s"
    )
    assert whole == len(BODIES)
    assert unfinished
    assert again

    second.wait_until(lambda: second.health()["status"] == "healthy", 20, "back")
    returned = executions(second)[0]
    deadline = time.monotonic() + 10
    while executions(second)[0] == returned:
        assert time.monotonic() < deadline, "the Triton that came back is given nothing"
        await generate_all(gateway, BODIES[:2])
