from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.parity import compare, compare_outputs, torch_outputs
from hypergen_export.conversion.wrappers import wrap
from hypergen_export.errors import ConversionError, ParityMissedError

from ..conftest import COMPONENTS


def parity_of(name: str, checkpoint: Checkpoint, repository: Path, change: Callable[[torch.nn.Module], None]) -> float:
    """The difference between an exported file and its module after `change`."""
    wrapped = wrap(COMPONENTS[name], load_module(checkpoint, COMPONENTS[name]))
    change(wrapped)
    return compare(COMPONENTS[name], wrapped, checkpoint.sizes, repository / name / "1" / "model.onnx").difference


def add_noise(amount: float) -> Callable[[torch.nn.Module], None]:
    def change(module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            parameter.add_(amount)

    return change


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_encoder"])
def test_an_export_agrees_with_torch_to_rounding(name: str, checkpoint: Checkpoint, repository: Path) -> None:
    assert parity_of(name, checkpoint, repository, lambda _: None) < 1e-5


@pytest.mark.parametrize("name", COMPONENTS)
def test_other_weights_are_a_miss(name: str, checkpoint: Checkpoint, repository: Path) -> None:
    with pytest.raises(ParityMissedError, match=f"{name}: .* differs from torch by"):
        parity_of(name, checkpoint, repository, add_noise(0.02))


def test_not_a_number_is_a_miss(checkpoint: Checkpoint, repository: Path) -> None:
    with pytest.raises(ParityMissedError, match=r"text_encoder: .* gives non-finite values"):
        parity_of("text_encoder", checkpoint, repository, add_noise(float("nan")))


def test_where_torch_gives_zeros_anything_else_is_a_miss(checkpoint: Checkpoint, repository: Path) -> None:
    """In half precision the difference is relative to what torch gives."""
    component = COMPONENTS["text_encoder"]
    expected = torch_outputs(component, wrap(component, load_module(checkpoint, component)), checkpoint.sizes)
    zeros = [[np.zeros_like(output) for output in outputs] for outputs in expected]
    path = repository / component.name / "1" / "model.onnx"
    with pytest.raises(ParityMissedError, match="differs from torch by"):
        compare_outputs(component, zeros, checkpoint.sizes, path, "bfloat16")


def test_a_file_of_another_component_is_a_miss_or_refused(checkpoint: Checkpoint, repository: Path) -> None:
    wrapped = wrap(COMPONENTS["vae_decoder"], load_module(checkpoint, COMPONENTS["vae_decoder"]))
    path = repository / "vae_decoder" / "1" / "model.onnx"
    with pytest.raises(ParityMissedError):
        # Twice the latents: an image of another size.
        compare(COMPONENTS["vae_decoder"], _Enlarged(wrapped), checkpoint.sizes, path)


def test_a_broken_file_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    component = COMPONENTS["text_encoder"]
    wrapped = wrap(component, load_module(checkpoint, component))
    with pytest.raises(ConversionError, match="OpenVINO rejects"):
        compare(component, wrapped, checkpoint.sizes, tmp_path / "model.onnx")


class _Enlarged(torch.nn.Module):
    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs: tuple[torch.Tensor, torch.Tensor] = self.decoder(latents.repeat(1, 1, 2, 2))
        return outputs
