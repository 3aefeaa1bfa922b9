"""Two gateways before one real Triton, as behind one address: what holds across them, and what each has for itself."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest

from support.running_server import KEY, Server, generate, generate_all, generate_together, start_server, stop_server

Gateways = tuple[Server, Server]
BODY = {"prompt": "cat", "size": "64x64", "num_inference_steps": 4, "scheduler": "ddim", "response_format": "b64_json"}
ROWS = 2 * 4  # under classifier-free guidance


@pytest.fixture(scope="module")
def gateways(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """With a folder for links and a secret that signs them in common."""
    shared = ("--cache-dir", str(tmp_path_factory.mktemp("links")), "--link-secret", "the-same-for-both-gateways")
    with ExitStack() as stack:

        def start() -> Server:
            running = start_server("--triton-url", server.triton_url, *shared, model="")
            stack.callback(stop_server, running)
            return running

        yield start(), start()


def post(gateway: Server, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    """The response's only item of `data`."""
    url, authorization = f"{gateway.url}/v1/images/generations", {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(url, json=body, headers=authorization | headers, timeout=60)
    assert response.status_code == 200, response.text
    (item,) = response.json()["data"]
    return dict(item)


def test_a_link_of_one_gateway_is_served_by_the_other(gateways: Gateways) -> None:
    first, second = gateways
    link = post(first, BODY | {"response_format": "url", "seed": 7})["url"]
    assert link.startswith(first.url)
    file = httpx.get(link.replace(first.url, second.url))
    assert file.content == base64.b64decode(post(second, BODY | {"seed": 7})["b64_json"])
    forged = httpx.get(link.replace(first.url, second.url).replace("signature=", "signature=A"))
    assert forged.status_code == 404


def test_a_retry_with_its_key_gets_the_same_image_from_either(gateways: Gateways, server: Server) -> None:
    before = server.counts_of()[0]
    images = [post(gateway, BODY, **{"Idempotency-Key": "order-1"}) for gateway in (*gateways, *gateways)]
    assert len({image["b64_json"] for image in images}) == 1
    # Once by each: only the gateway that has generated it knows that it has.
    assert server.counts_of()[0] == before + 2 * ROWS
    others = [post(gateway, BODY) for gateway in gateways]
    assert len({image["b64_json"] for image in (*others, images[0])}) == 3


async def test_images_of_both_share_the_calls_of_the_unet(gateways: Gateways, server: Server) -> None:
    steps = 10
    body = {"prompt": "cat", "size": "64x64", "num_inference_steps": steps, "scheduler": "ddim"}
    bodies = [body | {"seed": seed} for seed in (1, 2)]
    expected = await generate_all(server, bodies)
    first, second = gateways
    async with first.async_client() as one, second.async_client() as other:
        requests = [generate(client, **fields) for client, fields in zip((one, other), bodies, strict=True)]
        both, executions = await generate_together(server, requests)
    assert executions == {2 * 2: steps}
    for image, wanted in zip(both, expected, strict=True):
        assert np.abs(image.astype(int) - wanted).max() <= 1
