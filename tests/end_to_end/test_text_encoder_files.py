"""FLUX.1 of files alone, but for configs and tokenizers, through the real Triton, against diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from support.parity import request_of
from support.pipelines import pipeline_of
from support.running_server import generate, start_server, stop_server
from support.single_text_encoders import save_text_encoder_file, without_weights
from support.single_transformers import NAMES, save_transformer_file
from support.transformer_pipelines import image_by_diffusers


async def test_images_of_flux1_from_files_equal_those_of_diffusers(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint_of("flux1-dev")
    given = [
        save_text_encoder_file(tmp_path / "clip_l.safetensors", folder, "text_encoder", "CLIP"),
        save_text_encoder_file(tmp_path / "t5xxl_fp16.safetensors", folder, "text_encoder_2", "T5"),
        without_weights(folder, tmp_path / "base"),
    ]
    file = save_transformer_file(tmp_path / "flux1-dev.safetensors", folder, NAMES["flux1-dev"], "")
    (vae,) = (folder / "vae").glob("*.safetensors")
    options = [option for each in given for option in ("--text-encoder", str(each))]
    options += ["--vae", str(vae), "--cache-dir", str(tmp_path / "cache"), "--dtype", "float32"]
    server = start_server(*options, model=str(file))
    fields: dict[str, Any] = {"prompt": "a red rocket", "seed": 1, "num_inference_steps": 4, "guidance_scale": 3.5}
    try:
        async with server.async_client() as client:
            ours = await generate(client, **fields, size="96x64")
    finally:
        assert stop_server(server) == 0, "\n".join(server.lines)
    theirs = image_by_diffusers(pipeline_of(folder), request_of(**fields, width=96, height=64))[1]
    assert theirs.std() > 10, "a flat image would prove nothing"
    levels = np.abs(ours.astype(int) - theirs.astype(int))
    print(f"at most {levels.max()}/255, mean {levels.mean():.5f}")
    assert levels.max() <= 1
