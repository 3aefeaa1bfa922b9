"""A single file with an embedding through the real Triton, against diffusers' pipeline of the same file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from support.chunks import ByWeightedChunks, Syntax, WeightedChunks
from support.running_server import KEY, Pixels, Server, generate, start_server, stop_server
from support.single_files import save_folder, save_single_file

PROMPT = "a red rocket on a blue background"
# Of 255, as in test_parity: the engine's rounding differs from torch's.
TOLERANCE = 0.1
# `mytoy` is an embedding of two vectors.
PLAIN = ("a green cat", ())
PROMPTS: dict[str, tuple[dict[str, Any], WeightedChunks]] = {
    "weights of stable-diffusion-webui, in two chunks": (
        {"prompt": "a (red mytoy:1.4) BREAK [on] blue", "prompt_weighting": "a1111"},
        {"a (red mytoy:1.4) BREAK [on] blue": (("a red mytoy mytoy_1", (1, 1.4, 1.4, 1.4)), ("on blue", (1 / 1.1,)))},
    ),
    "weights of compel, a layer skipped": (
        {"prompt": "a red+ mytoy++ on blue", "prompt_weighting": "compel", "clip_skip": 1},
        {"a red+ mytoy++ on blue": (("a red mytoy mytoy_1 on blue", (1, 1.1, 1.1**2, 1.1**2)),)},
    ),
    "no weights, a layer skipped": (
        {"prompt": "a (red:1.4) mytoy", "clip_skip": 1},
        {"a (red:1.4) mytoy": (("a (red:1.4) mytoy mytoy_1", ()),)},
    ),
}


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
    embedding = _save_embedding(place / "mytoy.safetensors", pipeline)
    options = ("--dtype", "float32", "--cache-dir", str(place / "cache"), "--embedding", str(embedding))
    server = start_server(*options, model=str(file))
    yield Served(server, pipeline)
    assert stop_server(server) == 0, "\n".join(server.lines)


def _save_embedding(file: Path, pipeline: Any) -> Path:
    """A textual inversion of two vectors for each text encoder; the pipeline knows it, too."""
    generator = torch.Generator().manual_seed(4)
    vectors = {key: torch.randn(2, width, generator=generator) for key, width in (("clip_l", 64), ("clip_g", 128))}
    save_file(vectors, file)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipeline, name + number) for name in ("tokenizer", "text_encoder")}
        pipeline.load_textual_inversion(vectors[key], token="mytoy", **parts)
    return file


async def test_its_images_equal_those_of_from_single_file(served: Served) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "a cat", "num_inference_steps": 6}
    async with served.server.async_client() as client:
        ours = await generate(client, **fields, guidance_scale=5.0, size="64x64", seed=5)
    assert difference(ours, by_diffusers(served.pipeline, fields)) <= TOLERANCE


@pytest.mark.parametrize(("body", "chunks"), PROMPTS.values(), ids=PROMPTS.keys())
async def test_weights_skipped_layers_and_embeddings_equal_diffusers_of_their_hidden_states(
    body: dict[str, Any], chunks: WeightedChunks, served: Served
) -> None:
    fields: dict[str, Any] = {"negative_prompt": PLAIN[0], "num_inference_steps": 6}
    async with served.server.async_client() as client:
        ours = await generate(client, **body, **fields, guidance_scale=5.0, size="64x64", seed=5)
    syntax: Syntax = "compel" if body.get("prompt_weighting") == "compel" else "a1111"
    reference = ByWeightedChunks(served.pipeline, {**chunks, PLAIN[0]: (PLAIN,)}, syntax, body.get("clip_skip", 0))
    assert difference(ours, by_diffusers(reference, {"prompt": body["prompt"], **fields})) <= TOLERANCE


def by_diffusers(pipeline: Any, fields: dict[str, Any]) -> Pixels:
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        made = pipeline(**fields, guidance_scale=5.0, width=64, height=64, generator=generator)
    return np.asarray(made.images[0])


def difference(ours: Pixels, theirs: Pixels) -> float:
    assert theirs.std() > 10, "a flat image would prove nothing"
    distances = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"mean difference {distances.mean():.4f}/255, largest {distances.max()}/255")
    return float(distances.mean())


def test_it_says_what_it_serves(served: Served) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    models = httpx.get(f"{served.server.url}/v1/models", headers=headers).json()
    assert [model["id"] for model in models["data"]] == [served.server.model]
    capabilities = httpx.get(f"{served.server.url}/v1/capabilities", headers=headers).json()
    assert capabilities["base_model"] == "Stable Diffusion XL"
    said = "\n".join(served.server.lines)
    assert "predicts v_prediction, as the tensor v_pred says" in said
    assert "Stable Diffusion XL: text to image, image to image and inpainting; 1024x1024 by default" in said
