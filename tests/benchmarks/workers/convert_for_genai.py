"""A diffusers checkpoint as OpenVINO GenAI reads it: OpenVINO's own converter on its modules and tokenizer.

    python convert_for_genai.py CHECKPOINT OUTPUT

Runs in the peer's environment. What optimum-intel does, without its dependencies: the same converter on the same
modules, traced by torch, with dynamic batch, height and width; weights are kept in float16, as there.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import openvino
import openvino_tokenizers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel


class _TextEncoder(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.module(input_ids).last_hidden_state
        return states


class _UNet(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        output: torch.Tensor = self.module(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class _Decoder(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.module.decode(latent_sample, return_dict=False)[0]
        return output


def main() -> None:
    checkpoint, output = (Path(argument) for argument in sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        _convert_text_encoder(checkpoint, output)
        _convert_unet(checkpoint, output)
        _convert_decoder(checkpoint, output)
    _convert_tokenizer(checkpoint, output)
    shutil.copytree(checkpoint / "scheduler", output / "scheduler", dirs_exist_ok=True)
    shutil.copy(checkpoint / "model_index.json", output)


def _convert_text_encoder(checkpoint: Path, output: Path) -> None:
    module = CLIPTextModel.from_pretrained(
        checkpoint / "text_encoder", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.zeros((2, module.config.max_position_embeddings), dtype=torch.int64)
    model = openvino.convert_model(_TextEncoder(module), example_input={"input_ids": ids})
    _save(model, checkpoint, output, "text_encoder")


def _convert_unet(checkpoint: Path, output: Path) -> None:
    module = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)
    config: Any = module.config
    example = {
        "sample": torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
        # One for all rows, a whole number: as GenAI hands it over.
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim),
    }
    model = openvino.convert_model(_UNet(module), example_input=example)
    _save(model, checkpoint, output, "unet")


def _convert_decoder(checkpoint: Path, output: Path) -> None:
    module = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    example = {"latent_sample": torch.randn(1, module.config.latent_channels, 8, 8)}
    model = openvino.convert_model(_Decoder(module), example_input=example)
    _save(model, checkpoint, output, "vae_decoder", config="vae")


def _save(model: Any, checkpoint: Path, output: Path, name: str, config: str = "") -> None:
    folder = output / name
    folder.mkdir(exist_ok=True)
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=True)
    shutil.copy(checkpoint / (config or name) / "config.json", folder)
    print(f"{name}: converted", flush=True)


def _convert_tokenizer(checkpoint: Path, output: Path) -> None:
    folder = output / "tokenizer"
    shutil.copytree(checkpoint / "tokenizer", folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    converted = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=False)
    openvino.save_model(converted, folder / "openvino_tokenizer.xml")


if __name__ == "__main__":
    main()
