"""VAEs whose configs state more than a scaling factor, compared with the diffusers pipelines that apply it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.miniature import save_miniature
from support.parity import Pair, by_diffusers, held, held_from_image, input_image, request_of, sampler_of
from support.pipelines import pipeline_of

STATED = {
    "mean and std": {"latents_mean": [0.3, -0.2, 0.6, -0.4], "latents_std": [0.5, 0.8, 1.3, 0.7]},
    "shift": {"shift_factor": 0.5},
}


@pytest.mark.parametrize("stated", STATED.values(), ids=STATED.keys())
@pytest.mark.parametrize("family", ["sd-1", "lcm", "sdxl"])
async def test_what_a_vae_states_of_its_latents_is_heeded_as_by_its_pipeline(
    family: str, stated: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_miniature(tmp_path, family=family)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    pair = Pair(sampler_of(folder), pipeline_of(folder))
    request = request_of(guidance_scale=3.0)
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))
    await held_from_image(pair, request_of(guidance_scale=3.0, image=input_image(), strength=0.6))
