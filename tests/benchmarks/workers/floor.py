"""The floor: the components of our own repository, back to back in one process, and nothing around them.

Runs in our environment: OpenVINO compiled for the very shapes, diffusers' scheduler, the guidance pair in one batch.
No server, no queue, no image file, no copy between processes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openvino
import torch
from diffusers.models.embeddings import get_timestep_embedding
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.workers.protocol import Job, serve
from hypergen_gateway.embedded.backends.openvino.compilations import read_model

Run = Callable[[dict[str, Any]], Any]
LATENT_SCALE = 8


class _Floor:
    """The components of a repository and the loop over them."""

    def __init__(self, options: Job) -> None:
        torch.set_num_threads(1)
        folder = Path(options["repository"])
        self._tokenizer = Tokenizer.from_file(str(folder / "diffusion" / "tokenizer.json"))
        table = json.loads((folder / "diffusion" / "schedulers.json").read_text())
        self._scheduler_config = table["schedulers"][""]
        self._channels = options["latent_channels"]
        self._encode = _compile(folder, "text_encoder", options)
        self._unet = _compile(folder, "unet", options)
        self._decode = _compile(folder, "vae_decoder", options)
        unet = openvino.Core().read_model(folder / "unet" / "1" / "model.onnx")
        self._time_width = unet.input("time").partial_shape[1].get_length()

    def generate(self, job: Job) -> Any:
        texts = ["", job["prompt"]] if job["guidance"] > 1 else [job["prompt"]]
        ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch(texts)], dtype=np.int32)
        # CLIP reads what fills a prompt up to its length, too.
        tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids), "clip_skip": np.zeros_like(ids[:, :1])}
        states = self._encode(tokens)["encoder_hidden_states"].copy()
        scheduler = getattr(diffusers, self._scheduler_config["_class_name"]).from_config(self._scheduler_config)
        scheduler.set_timesteps(job["steps"])
        latents = self._noise(job) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep).numpy()
            output = self._step(np.repeat(scaled, len(texts), axis=0), float(timestep), states, job["guidance"])
            latents = scheduler.step(output, timestep, latents).prev_sample
        return self._decode({"latents": latents.numpy()})["image"].copy()

    def _noise(self, job: Job) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(job["seed"])
        shape = (1, self._channels, job["height"] // LATENT_SCALE, job["width"] // LATENT_SCALE)
        return torch.randn(shape, generator=generator)

    def _step(self, sample: Any, timestep: float, states: Any, guidance: float) -> torch.Tensor:
        time = get_timestep_embedding(torch.full((len(sample),), timestep), self._time_width, True, 0).numpy()
        inputs = {"sample": sample, "time": time, "encoder_hidden_states": states}
        output = torch.from_numpy(self._unet(inputs)["model_output"])
        if len(sample) == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def _compile(folder: Path, name: str, options: Job) -> Run:
    """The component as our backend rewrites it, compiled for each set of shapes, which is faster than once for all."""
    properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": options["precision"]}
    core = openvino.Core()
    requests: dict[tuple[Any, ...], Any] = {}

    def run(inputs: dict[str, Any]) -> Any:
        shapes = {name: list(array.shape) for name, array in inputs.items()}
        key = tuple(map(tuple, shapes.values()))
        if key not in requests:
            model = read_model(core, folder / name / "1" / "model.onnx")
            model.reshape(shapes)
            requests[key] = core.compile_model(model, "CPU", properties).create_infer_request()
        return requests[key].infer(inputs, share_inputs=True, share_outputs=True)

    return run


if __name__ == "__main__":
    serve(lambda options: [_Floor(options).generate])
