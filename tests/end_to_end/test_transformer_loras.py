"""LoRAs in the rank pool of a transformer, through the real Triton, against diffusers: Z-Image, in float32.

`tests/test_lora_pool.py` has all families in torch, and tests/export/engines the graph of one in bfloat16.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository
from support.loras import lora_weights, save_by_ai_toolkit, save_by_kohya
from support.parity import request_of
from support.pipelines import pipeline_of
from support.running_server import KEY, Pixels, Server, generate, generate_together, start_server, stop_server
from support.transformer_pipelines import image_by_diffusers

pytestmark = pytest.mark.claim("families")

# Four of each of ink and clay, and four for files that come.
COLUMNS = 16
WISH: dict[str, Any] = {"prompt": "a red rocket", "num_inference_steps": 5, "guidance_scale": 3.5, "size": "96x64"}


@pytest.fixture(scope="module")
def checkpoint(family_of: Callable[[str], tuple[Path, Path]]) -> Path:
    """Exported without a pool, too: text encoder and VAE are taken from there."""
    return family_of("z-image")[0]


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """All change every linear layer. `pen` comes while the server runs."""
    folder = tmp_path_factory.mktemp("loras")
    ink, clay, pen = (lora_weights(checkpoint, "transformer", seed=seed) for seed in (3, 4, 5))
    return {
        "ink": save_by_ai_toolkit(folder / "ink.safetensors", ink["transformer"]),
        "clay": save_by_kohya(folder / "clay.safetensors", clay, alpha=2.0),
        "pen": save_by_ai_toolkit(folder / "pen.safetensors", pen["transformer"]),
    }


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path, files: Mapping[str, Path]) -> Any:
    made = pipeline_of(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is an adapter already
        for name, file in files.items():
            made.load_lora_weights(str(file), adapter_name=name)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server gets as --lora-dir."""
    return tmp_path_factory.mktemp("lora-dir")


@pytest.fixture(scope="module")
def server(checkpoint: Path, files: Mapping[str, Path], folder: Path, cache_dir: Path) -> Iterator[Server]:
    loras = tuple(f"{name}={files[name]}" for name in ("ink", "clay"))
    options = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=cache_dir, loras=loras, lora_rank=COLUMNS)
    asyncio.run(find_repository(str(checkpoint), options))  # takes longer than a start may
    given = [word for lora in loras for word in ("--lora", lora)]
    given += ["--lora-rank", str(COLUMNS), "--lora-dir", str(folder)]
    running = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), *given, model=str(checkpoint))
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


def with_loras(scales: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    return {**WISH, **fields, "loras": [{"name": name, "scale": scale} for name, scale in scales.items()]}


def by_diffusers(pipeline: Any, scales: Mapping[str, float], seed: int) -> Pixels:
    pipeline.set_adapters(list(scales), list(scales.values()))
    given = {name: value for name, value in WISH.items() if name != "size"}
    return image_by_diffusers(pipeline, request_of(**given, seed=seed, width=96, height=64))[1]


def largest_difference(ours: Pixels, theirs: Pixels) -> int:
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


@pytest.mark.parametrize("scales", [{"ink": 1.0}, {"clay": -0.7}, {"ink": 0.5, "clay": -0.25}], ids=str)
async def test_images_equal_load_lora_weights_and_set_adapters_of_diffusers(
    scales: dict[str, float], server: Server, pipeline: Any
) -> None:
    async with server.async_client() as client:
        plain = await generate(client, **WISH, seed=5)
        ours = await generate(client, **with_loras(scales, seed=5))
    theirs = by_diffusers(pipeline, scales, seed=5)
    print(f"{scales}: at most {largest_difference(ours, theirs)}/255")
    assert theirs.std() > 10, "a flat image would prove nothing"
    assert largest_difference(ours, theirs) <= 1
    assert np.abs(ours.astype(int) - plain.astype(int)).mean() > 1, "the LoRAs change nothing"


async def test_requests_with_different_loras_at_once_give_the_images_that_each_gives_alone(server: Server) -> None:
    loras: list[dict[str, float]] = [{}, {"ink": 1.0}, {"clay": 0.8}, {"ink": -0.5, "clay": 1.0}, {}]
    steps = 8
    bodies = [with_loras(scales, seed=seed, num_inference_steps=steps) for seed, scales in enumerate(loras)]
    async with server.async_client() as client:
        alone = [await generate(client, **fields) for fields in bodies]
        requests = [generate(client, **fields) for fields in bodies]
        together, executions = await generate_together(server, requests, "transformer")
    assert max(largest_difference(*pair) for pair in zip(alone, together, strict=True)) <= 1
    assert executions == {len(bodies) * 2: steps}


async def test_a_file_of_the_folder_is_served_and_one_for_another_model_is_listed_with_that(
    server: Server, folder: Path, files: Mapping[str, Path], pipeline: Any
) -> None:
    layer = "transformer.single_transformer_blocks.0.norm.linear"
    flux = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(flux, folder / "flux.part")
    (folder / "pen.part").write_bytes(files["pen"].read_bytes())
    for name in ("flux", "pen"):
        (folder / f"{name}.part").rename(folder / f"{name}.safetensors")

    def listed() -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"{server.url}/v1/loras", headers={"Authorization": f"Bearer {KEY}"}).json()
        return {lora["name"]: lora for lora in answer["data"]}

    await asyncio.to_thread(server.wait_until, lambda: listed().keys() == {"ink", "clay", "pen", "flux"}, 120, "listed")
    found = listed()
    assert found["pen"] == found["pen"] | {"rank": 4, "in_pool": True, "changes": ["transformer"]}
    reason = (
        f"it has none of its layers, for example {layer.removeprefix('transformer.')}; its layers are those of FLUX.1"
    )
    assert found["flux"]["error"] == f"flux.safetensors: does not fit this model's transformer ({reason})"
    scales = {"pen": 0.8, "ink": -0.5}
    async with server.async_client() as client:
        ours = await generate(client, **with_loras(scales, seed=6))
    assert largest_difference(ours, by_diffusers(pipeline, scales, seed=6)) <= 1
