"""Families whose components and inputs differ from Stable Diffusion's, through the real Triton, against diffusers.

The others differ in weights and schedulers alone: tests/test_families.py holds each against its pipeline in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from support.deep_cache import deep_features_reused
from support.pipelines import pipeline_of
from support.running_server import Pixels, Server, generate, generate_together, start_server, stop_server

pytestmark = pytest.mark.claim("families")

PROMPT = "a red rocket on a blue background"
# Of 255, as in test_parity: the engine's rounding differs from torch's.
TOLERANCE = 0.1

BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {
        "no negative prompt": {"num_inference_steps": 6, "guidance_scale": 5.0},
        "an empty negative prompt": {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": ""},
        "a negative prompt": {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": "a green cat"},
        "no guidance, another size": {"num_inference_steps": 6, "guidance_scale": 1.0, "size": "104x72"},
        "deep features reused": {"num_inference_steps": 7, "guidance_scale": 5.0, "cache_interval": 3},
        "its defaults": {},
    },
    "lcm": {
        "deep features reused": {"num_inference_steps": 7, "size": "104x72", "cache_interval": 2},
        "less guidance": {"num_inference_steps": 6, "guidance_scale": 2.0},
        "no guidance, another size": {"num_inference_steps": 6, "guidance_scale": 1.0, "size": "104x72"},
        "its defaults": {},
    },
}


@dataclass
class RequestRecord:
    server: Server
    pipeline: Any


@pytest.fixture(scope="module", params=BODIES)
def served(
    request: pytest.FixtureRequest, family_of: Callable[[str], tuple[Path, Path]], cache_dir: Path
) -> Iterator[RequestRecord]:
    folder, repository = family_of(request.param)
    assert repository.parent == cache_dir
    options = ("--dtype", "float32", "--cache-dir", str(cache_dir), "--deep-cache")
    server = start_server(*options, model=str(folder))
    yield RequestRecord(server, pipeline_of(folder))
    assert stop_server(server) == 0, "\n".join(server.lines)


def by_diffusers(pipeline: Any, fields: dict[str, Any]) -> Pixels:
    """What the pipeline generates; fields that are absent have its own defaults."""
    width, height = (int(side) for side in fields.get("size", "64x64").split("x"))
    given = {name: value for name, value in fields.items() if name not in ("size", "seed", "cache_interval")}
    generator = torch.Generator().manual_seed(fields["seed"])
    with deep_features_reused(pipeline.unet, fields.get("cache_interval", 1)):
        return np.asarray(pipeline(**given, width=width, height=height, generator=generator).images[0])


def difference(ours: Pixels, theirs: Pixels) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 10, "a flat image would prove nothing"
    distances = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"mean difference {distances.mean():.4f}/255, largest {distances.max()}/255")
    return float(distances.mean())


async def test_its_images_equal_those_of_diffusers(served: RequestRecord, request: pytest.FixtureRequest) -> None:
    before = served.server.counts_of("unet_shallow")[1]
    async with served.server.async_client() as client:
        for name, fields in BODIES[request.node.callspec.params["served"]].items():
            full = {"prompt": PROMPT, "seed": 5, **fields}
            print(name, end=": ")
            assert difference(await generate(client, **full), by_diffusers(served.pipeline, full)) <= TOLERANCE, name
    # Of seven steps three, or four, went through the whole UNet.
    assert served.server.counts_of("unet_shallow")[1] - before in (3, 4)


async def test_an_interval_of_guidance_is_refused_where_the_unet_has_guidance_inside(
    served: RequestRecord, request: pytest.FixtureRequest
) -> None:
    fields = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 3.0, "guidance_end": 0.5}
    async with served.server.async_client() as client:
        if request.node.callspec.params["served"] == "sdxl":
            assert (await generate(client, **fields)).shape == (64, 64, 3)
            return
        with pytest.raises(openai.BadRequestError, match="inside its denoiser") as refusal:
            await generate(client, **fields)
    assert refusal.value.param == "guidance_end"


async def test_requests_that_share_a_batch_give_the_images_that_each_gives_alone(
    served: RequestRecord, request: pytest.FixtureRequest
) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "a red rocket", "seed": 1, "num_inference_steps": 12},
        {"prompt": "a blue cat", "seed": 2, "num_inference_steps": 9, "guidance_scale": 4.0},
        {"prompt": "green", "seed": 3, "num_inference_steps": 12, "guidance_scale": 1.0},
        {"prompt": "a green cat", "seed": 5, "num_inference_steps": 12, "cache_interval": 2},
        {"prompt": "red", "seed": 4, "num_inference_steps": 8, "size": "104x72"},
    ]
    if request.node.callspec.params["served"] == "sdxl":  # the other has guidance inside, and no negative prompt
        bodies[-1]["negative_prompt"] = "cat"
    async with served.server.async_client() as client:
        alone = [await generate(client, **fields) for fields in bodies]
        together, executions = await generate_together(served.server, [generate(client, **fields) for fields in bodies])
    print(f"{executions} for {sum(fields['num_inference_steps'] for fields in bodies)} steps")
    assert max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(alone, together, strict=True)) <= 1
    assert executions.total() < sum(fields["num_inference_steps"] for fields in bodies)
