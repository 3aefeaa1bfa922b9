"""LoRAs in the rank pool, in torch, against diffusers' `load_lora_weights` and `set_adapters`."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_sampler.lora import LoraSelection, ServedLora, pool_scales
from support.loras import RANK, lora_weights, save_by_diffusers, save_by_kohya
from support.parity import Sampler, by_diffusers, held, request_of, sampler_of
from support.pipelines import pipeline_of
from support.transformer_pipelines import image_by_diffusers

pytestmark = pytest.mark.claim("families")

NAMES = ("ink", "clay", "oil")
# Family -> what its LoRAs change: the denoiser, and all text encoders that can have a rank pool.
CHANGED = {
    "sd-1": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "flux1-dev": ("transformer", "text_encoder"),
    "chroma": ("transformer",),
    "flux2-klein": ("transformer",),
    "stable-diffusion-3": ("transformer", "text_encoder", "text_encoder_2"),
    "z-image": ("transformer",),
    "qwen-image": ("transformer",),
    "sana": ("transformer",),
}


def columns_of(name: str) -> tuple[int, ...]:
    """Not in a row, as in a pool whose LoRAs come and go."""
    return tuple(range(NAMES.index(name), len(NAMES) * RANK, len(NAMES)))


@dataclass(frozen=True)
class Loras:
    """Our sampler with three LoRAs in its pool, and diffusers' pipeline with the same."""

    sampler: Sampler
    pipeline: Any

    @staticmethod
    def select(scales: Mapping[str, float]) -> LoraSelection:
        chosen = [(ServedLora(name=name, scale=1.0, columns=columns_of(name)), scale) for name, scale in scales.items()]
        return LoraSelection(scales=pool_scales(len(NAMES) * RANK, chosen))


def load(folder: Path, family: str, checkpoint: Path) -> Loras:
    denoiser, *encoders = CHANGED[family]
    others = lora_weights(checkpoint, denoiser, *encoders, seed=2)
    files = [
        save_by_diffusers(folder / "ink", lora_weights(checkpoint, denoiser, *encoders, seed=1)),
        save_by_kohya(folder / "clay.safetensors", others, alpha=2.0)
        if denoiser == "unet"
        else save_by_diffusers(folder / "clay", others),
        save_by_diffusers(folder / "oil", lora_weights(checkpoint, denoiser, seed=3)),
    ]
    pipeline = pipeline_of(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is an adapter already
        for name, file in zip(NAMES, files, strict=True):
            pipeline.load_lora_weights(str(file), adapter_name=name)
    placements = [
        Placement(Lora(name=name, file=file), columns_of(name)) for name, file in zip(NAMES, files, strict=True)
    ]
    return Loras(
        sampler_of(checkpoint, pool=LoraPool(rank=len(NAMES) * RANK, kernels=True), placements=placements), pipeline
    )


@pytest.fixture(scope="module")
def loras_of(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loras]:
    made: dict[str, Loras] = {}

    def get(family: str) -> Loras:
        if family not in made:
            made[family] = load(tmp_path_factory.mktemp(family), family, checkpoint_of(family))
        return made[family]

    return get


@pytest.mark.parametrize(
    ("family", "scales"),
    [
        ("sd-1", {"ink": 1.0}),
        ("sd-1", {"clay": -0.7}),
        ("sd-1", {"ink": 0.35, "clay": 0.8}),
        ("sdxl", {"ink": 0.5, "clay": -0.25, "oil": 1.3}),
        ("flux1-dev", {"ink": 0.5, "clay": -0.25}),
        ("chroma", {"ink": 0.5, "clay": -0.25}),
        ("flux2-klein", {"ink": 0.5, "clay": -0.25}),
        ("stable-diffusion-3", {"ink": 0.5, "clay": -0.25}),
        ("z-image", {"ink": 0.5, "clay": -0.25}),
        ("qwen-image", {"ink": 0.5, "clay": -0.25}),
        ("sana", {"ink": 0.5, "clay": -0.25}),
    ],
)
async def test_images_equal_set_adapters_of_diffusers(
    family: str, scales: dict[str, float], loras_of: Callable[[str], Loras]
) -> None:
    loras = loras_of(family)
    guided: dict[str, Any] = {"guidance_scale": 1.0 if family == "flux2-klein" else 5.0}
    if not family.startswith("flux"):
        guided["negative_prompt"] = "a green cat"
    request = request_of(**guided, loras=loras.select(scales))
    loras.pipeline.set_adapters(list(scales), list(scales.values()))
    ours = await loras.sampler.generate(request)
    held(ours, (by_diffusers if "unet" in CHANGED[family] else image_by_diffusers)(loras.pipeline, request))
    plain, _ = await loras.sampler.generate(replace(request, loras=loras.select({})))
    assert np.abs(plain - ours[0]).max() > 0.01 * np.abs(plain).max(), "the LoRAs change nothing"


async def test_without_loras_the_pool_changes_nothing(loras_of: Callable[[str], Loras]) -> None:
    loras = loras_of("sd-1")
    loras.pipeline.disable_lora()
    request = request_of(guidance_scale=5.0, loras=loras.select({}))
    held(await loras.sampler.generate(request), by_diffusers(loras.pipeline, request))
    loras.pipeline.enable_lora()


async def test_images_with_different_loras_share_batches_and_stay_their_own(loras_of: Callable[[str], Loras]) -> None:
    loras = loras_of("sd-1")
    sampler = loras.sampler
    scales: list[dict[str, float]] = [{}, {"ink": 1.0}, {"clay": -0.5, "oil": 0.5}, {"oil": 1.2}, {}]
    requests = [
        request_of(seed=seed, scheduler="ddim", guidance_scale=3.0, loras=loras.select(each))
        for seed, each in enumerate(scales)
    ]
    alone = [await sampler.generate(request) for request in requests]
    sampler.rows_of_calls.clear()
    loop = sampler.loop()
    together = await asyncio.gather(*(sampler.generate(request, loop) for request in requests))
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()
    assert sampler.rows_of_calls == [10] * 4
