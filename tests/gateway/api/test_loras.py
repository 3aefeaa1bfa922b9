"""GET /v1/loras."""

from __future__ import annotations

from dataclasses import replace

import httpx

from hypergen_gateway.generation.backend import Lora
from support.fake_backend import MODEL, FakeBackend

INK = Lora(name="ink", scale=0.8, columns=4, changes=("text_encoder", "unet"))
PEN = Lora(name="pen", scale=1.0, columns=8, in_pool=False)
CLAY = Lora(name="clay", scale=1.0, is_merged=True)


async def test_loras_are_listed_with_those_that_cannot_be_served(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.description = replace(MODEL, loras=(INK, CLAY, replace(CLAY, scale=0.5), PEN))
    backend.rejected_loras = {"oil": "oil.safetensors: not a safetensors file"}
    assert (await client.get("/v1/loras")).json() == {
        "object": "list",
        "data": [
            {
                "object": "lora",
                "name": "ink",
                "default_scale": 0.8,
                "rank": 4,
                "in_pool": True,
                "changes": ["text_encoder", "unet"],
            },
            {"object": "lora", "name": "clay", "default_scale": 1.0, "changes": []},
            {"object": "lora", "name": "pen", "default_scale": 1.0, "rank": 8, "in_pool": False, "changes": []},
            {"object": "lora", "name": "oil", "changes": [], "error": "oil.safetensors: not a safetensors file"},
        ],
    }
