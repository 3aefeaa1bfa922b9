"""The floor: the components of our own repository, back to back in one process, and nothing around them.

Runs in our environment: OpenVINO with the sampler's settings, diffusers' scheduler, the guidance pair in one batch.
No server, no queue, no picture file, no copy between processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openvino
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.workers.protocol import Draw, Job, serve


def load(options: Job) -> list[Draw]:
    torch.set_num_threads(1)
    folder = Path(options["repository"])
    tokenizer = Tokenizer.from_file(str(folder / "diffusion" / "tokenizer.json"))
    scheduler_config = json.loads((folder / "diffusion" / "scheduler_config.json").read_text())
    encode, unet, decode = (_compile(folder, name, options) for name in ("text_encoder", "unet", "vae_decoder"))
    channels = options["latent_channels"]

    def draw(job: Job) -> Any:
        texts = ["", job["prompt"]] if job["guidance"] > 1 else [job["prompt"]]
        ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], dtype=np.int32)
        states = encode({"input_ids": ids})["encoder_hidden_states"].copy()
        scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)
        scheduler.set_timesteps(job["steps"])
        generator = torch.Generator("cpu").manual_seed(job["seed"])
        latents = torch.randn((1, channels, job["height"] // 8, job["width"] // 8), generator=generator)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep).numpy()
            inputs = {
                "sample": np.repeat(scaled, len(texts), axis=0),
                "timestep": np.full(len(texts), float(timestep), dtype=np.float32),
                "encoder_hidden_states": states,
            }
            output = torch.from_numpy(unet(inputs)["model_output"])
            if len(texts) == 2:
                unconditional, conditional = output.chunk(2)
                output = unconditional + job["guidance"] * (conditional - unconditional)
            latents = scheduler.step(output, timestep, latents).prev_sample
        return decode({"latents": latents.numpy()})["image"].copy()

    return [draw]


def _compile(folder: Path, name: str, options: Job) -> Any:
    properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": options["precision"]}
    model = openvino.Core().compile_model(folder / name / "1" / "model.onnx", "CPU", properties)
    request = model.create_infer_request()
    return lambda inputs: request.infer(inputs, share_inputs=True, share_outputs=True)


if __name__ == "__main__":
    serve(load)
