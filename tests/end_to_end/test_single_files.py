"""A single file through the real Triton, against diffusers' pipeline of the same file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from support.running_server import KEY, Server, generate, start_server, stop_server
from support.single_files import save_folder, save_single_file

PROMPT = "a red rocket on a blue background"
# Of 255, as in test_parity: the engine's rounding differs from torch's.
TOLERANCE = 0.1


@dataclass
class Served:
    """The server of a file, and diffusers' pipeline of it."""

    server: Server
    pipeline: Any


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """SDXL with velocity and a schedule that ends in pure noise, as NoobAI's: the furthest from a folder's defaults."""
    place = tmp_path_factory.mktemp("single")
    folder = save_folder(place / "folder", "sdxl-v")
    file = save_single_file(place / "my model.safetensors", folder, "sdxl-v", torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    server = start_server("--dtype", "float32", "--cache-dir", str(place / "cache"), model=str(file))
    yield Served(server, pipeline)
    assert stop_server(server) == 0, "\n".join(server.lines)


async def test_its_images_equal_those_of_from_single_file(served: Served) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "a cat", "num_inference_steps": 6}
    async with served.server.async_client() as client:
        ours = await generate(client, **fields, guidance_scale=5.0, size="64x64", seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        made = served.pipeline(**fields, guidance_scale=5.0, width=64, height=64, generator=generator)
    theirs = np.asarray(made.images[0])
    assert theirs.std() > 10, "a flat image would prove nothing"
    distances = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"mean difference {distances.mean():.4f}/255, largest {distances.max()}/255")
    assert distances.mean() <= TOLERANCE


def test_it_says_what_it_serves(served: Served) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    models = httpx.get(f"{served.server.url}/v1/models", headers=headers).json()
    assert [model["id"] for model in models["data"]] == [served.server.model]
    capabilities = httpx.get(f"{served.server.url}/v1/capabilities", headers=headers).json()
    assert capabilities["base_model"] == "Stable Diffusion XL"
    said = "\n".join(served.server.lines)
    assert "predicts v_prediction, as the tensor v_pred says" in said
    assert "Stable Diffusion XL: text to image, image to image and inpainting; 1024x1024 by default" in said
