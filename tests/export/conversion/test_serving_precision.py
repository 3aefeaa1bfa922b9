"""Parity in the arithmetic that serves: OpenVINO in bfloat16 against torch in bfloat16, both held against float32.

Float32 alone hides what an engine does to single operations in bfloat16, such as rounding the angle of a sine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import pytest
import torch
from diffusers import UNet2DConditionModel

from hypergen_export.checkpoints.checkpoint import SHIPPED_MODEL, Checkpoint, open_checkpoint
from hypergen_export.checkpoints.defaults import checkpoint_parameters
from hypergen_gateway.embedded.backends.openvino.compilations import read_model
from hypergen_sampler.sinusoids import Sinusoid

# Early steps: a UNet is told a large number, and a wrong one decides the composition.
TIMESTEPS = (999.0, 961.0, 847.0, 703.0)
# Of torch's own error in bfloat16.
ALLOWED = 1.15
SIDES = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)

Array = npt.NDArray[np.float32]


@pytest.fixture(params=["shipped", "sd-1", "sdxl"])
def exported_unet(
    request: pytest.FixtureRequest, family_of: Callable[[str], tuple[Path, Path]], shipped_repository: Path
) -> tuple[Checkpoint, Path]:
    """A checkpoint and its UNet's ONNX file."""
    model, repository = (SHIPPED_MODEL, shipped_repository) if request.param == "shipped" else family_of(request.param)
    return open_checkpoint(str(model)), repository / "unet" / "1" / "model.onnx"


@torch.no_grad()
def test_a_unet_in_bfloat16_is_as_exact_as_torch_in_bfloat16_at_every_timestep(
    exported_unet: tuple[Checkpoint, Path],
) -> None:
    checkpoint, onnx = exported_unet
    unet = UNet2DConditionModel.from_pretrained(checkpoint.folder / "unet", torch_dtype=torch.float32).eval()
    given = _given(checkpoint)
    exact = _by_torch(unet, given)
    torchs_errors = _errors(_by_torch(unet.to(torch.bfloat16), given), exact)
    errors = _errors(_by_openvino(checkpoint, given, onnx), exact)
    print(f"torch {np.round(torchs_errors, 4)}, OpenVINO {np.round(errors, 4)}")
    assert (errors <= ALLOWED * torchs_errors).all(), (errors / torchs_errors).round(2)


def _given(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What a UNet is told beside timesteps and sizes: noise, a row per timestep."""
    sizes = checkpoint.sizes
    shapes = {
        "sample": (sizes["latent_channels"], 8, 8),
        "encoder_hidden_states": (sizes["tokens"], sizes["context_width"]),
    }
    if "text_embeds" in checkpoint.family.denoiser_inputs:
        shapes["text_embeds"] = (sizes["pooled_width"],)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn((len(TIMESTEPS), *shape), generator=generator) for name, shape in shapes.items()}


def _by_torch(unet: Any, given: dict[str, torch.Tensor]) -> Array:
    tensors = {name: tensor.to(unet.dtype) for name, tensor in given.items()}
    sides = torch.tensor([SIDES] * len(TIMESTEPS))
    output = unet(
        tensors["sample"],
        torch.tensor(TIMESTEPS),
        tensors["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": tensors.get("text_embeds"), "time_ids": sides},
    ).sample
    return np.asarray(output.float().numpy())


def _by_openvino(checkpoint: Checkpoint, given: dict[str, torch.Tensor], onnx: Path) -> Array:
    core = openvino.Core()
    compiled = core.compile_model(read_model(core, onnx), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    inputs = {name: tensor.numpy() for name, tensor in given.items()} | {
        "time": _embedding(checkpoint, "time")(TIMESTEPS)
    }
    if "size_embeds" in checkpoint.family.denoiser_inputs:
        inputs["size_embeds"] = np.stack([_embedding(checkpoint, "size")(SIDES).reshape(-1)] * len(TIMESTEPS))
    return np.asarray(compiled(inputs)["model_output"])


def _embedding(checkpoint: Checkpoint, of: str) -> Sinusoid:
    """As the sampler makes it of the parameters that it is given."""
    parameters = checkpoint_parameters(checkpoint)
    return Sinusoid(
        width=int(parameters[f"{of}_width"]),
        flip_sin_to_cos=bool(int(parameters["flip_sin_to_cos"])),
        freq_shift=float(parameters["freq_shift"]),
    )


def _errors(output: Array, exact: Array) -> npt.NDArray[np.float64]:
    """Root mean square of each row's error, relative to the row's own."""
    axes = tuple(range(1, exact.ndim))
    difference = output.astype(np.float64) - exact
    errors: npt.NDArray[np.float64] = np.sqrt(np.square(difference).mean(axes) / np.square(exact).mean(axes))
    return errors
