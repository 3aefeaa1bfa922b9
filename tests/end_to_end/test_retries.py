"""Connections that break: OpenAI's client asks again, and the UNet does its work once."""

from __future__ import annotations

import asyncio

import openai

from support.cutting_proxy import cutting_proxy
from support.running_server import KEY, Server, generate

STEPS = 150
ROWS = 2 * STEPS  # under classifier-free guidance


async def test_a_retry_after_a_cut_connection_joins_its_own_work(server: Server) -> None:
    before = server.counts_of()[0]
    async with cutting_proxy(server.url) as proxy:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as client:
            fields = {"prompt": "cat", "size": "128x128", "num_inference_steps": STEPS, "scheduler": "ddim"}
            request = asyncio.create_task(generate(client, **fields))
            while server.counts_of()[0] < before + 4:
                await asyncio.sleep(0.02)
            proxy.cut()
            assert (await request).shape == (128, 128, 3)
        assert proxy.connections == 2
    assert server.counts_of()[0] == before + ROWS
