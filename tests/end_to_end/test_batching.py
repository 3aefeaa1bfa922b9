"""Step-level continuous batching, seen through Triton's own counters of UNet executions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from support.running_server import (
    Server,
    generate,
    generate_all,
    generate_together,
    long_requests,
)

# Of 255. Alone and in a batch the engine sums in another order, and a value near x.5 may become another byte.
LARGEST_DIFFERENCE = 1

BODIES: list[dict[str, Any]] = [
    {"prompt": "a red rocket", "seed": 1, "num_inference_steps": 12, "scheduler": "ddim"},
    {"prompt": "a blue cat", "seed": 2, "num_inference_steps": 20, "scheduler": "euler"},
    {"prompt": "green", "seed": 3, "num_inference_steps": 16, "guidance_scale": 1.0, "scheduler": "ddim"},
    {"prompt": "a cat on red background", "seed": 4, "num_inference_steps": 8, "guidance_scale": 3.0},
    {"prompt": "rocket", "seed": 5, "num_inference_steps": 20, "negative_prompt": "blue", "scheduler": "unipc"},
    {"prompt": "blue background", "seed": 6, "num_inference_steps": 15, "scheduler": "dpmpp_2m"},
    {"prompt": "cat", "seed": 7, "num_inference_steps": 10, "scheduler": "euler_a"},
    {"prompt": "red", "seed": 8, "num_inference_steps": 18, "scheduler": "ddim", "size": "104x72"},
]


async def test_eight_requests_at_once_give_the_images_that_each_gives_alone(server: Server) -> None:
    async with server.async_client() as client:
        alone = [await generate(client, **fields) for fields in BODIES]
    together = await generate_all(server, BODIES)
    largest = max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(alone, together, strict=True))
    print(f"largest difference {largest}/255")
    assert largest <= LARGEST_DIFFERENCE


async def test_concurrent_requests_share_calls_of_the_unet(server: Server) -> None:
    async with server.async_client() as client:
        unguided = [generate(client, **fields | {"guidance_scale": 1.0}) for fields in BODIES]
        _, executions = await generate_together(server, unguided)
    steps = [fields["num_inference_steps"] for fields in BODIES]
    print(f"{executions.total()} executions of the UNet for {sum(steps)} steps: {executions}")
    # The odd-sized image needs a call of its own at each of its steps; the seven others, with a row each, share theirs.
    assert executions.total() == max(steps[:-1]) + steps[-1]


async def test_a_short_job_overtakes_long_ones(server: Server) -> None:
    async with long_requests(server, 4) as long, server.async_client() as client:
        await generate(client, prompt="rocket", num_inference_steps=4)
        assert not any(request.done() for request in long)


async def test_a_client_that_leaves_stops_its_work(server: Server) -> None:
    before = server.counts_of()[1]
    async with long_requests(server, 1, n=2):
        while server.counts_of()[1] < before + 3:
            await asyncio.sleep(0.02)
    async with server.async_client() as client:
        # The step under way is counted when it ends, which the next image waits for.
        await generate(client, prompt="cat", num_inference_steps=2, scheduler="ddim")
        stopped_at = server.counts_of()[1]
        assert stopped_at < before + 150
        await generate(client, prompt="cat", num_inference_steps=8, scheduler="ddim")
    assert server.counts_of()[1] == stopped_at + 8, "steps of the work that was given up"


async def test_a_burst_is_served_to_the_last_request(server: Server) -> None:
    bodies = [{"prompt": "cat", "seed": seed, "num_inference_steps": 3} for seed in range(64)]
    images = await generate_all(server, bodies)
    assert len({image.tobytes() for image in images}) == 64
    deadline = time.monotonic() + 5
    while server.health()["queue_size"] != 0:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
