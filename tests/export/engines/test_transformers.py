"""Components of transformer families: ONNX against torch in both precisions, and TensorRT-RTX engines of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.checkpoints.defaults import longest_text, max_reference_tokens
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.onnx import capture, write_onnx
from hypergen_export.conversion.parity import compare
from hypergen_export.conversion.wrappers import wrap
from hypergen_export.engines.engine import read_sizes
from hypergen_export.engines.profiles import Shapes, profiles
from hypergen_export.engines.tensorrt import Build, Target, build_plan, rtx_target

pytest.importorskip("tensorrt_rtx")

# Families that share a component's architecture are built once.
ENGINES = [
    ("flux1-dev", "text_encoder_2", "bfloat16"),
    ("flux1-dev", "transformer", "bfloat16"),
    ("flux1-kontext", "transformer", "bfloat16"),
    ("flux2-klein", "transformer", "bfloat16"),
    ("flux2-klein", "vae_decoder", "bfloat16"),
    ("flux2-klein", "vae_encoder", "bfloat16"),
    ("z-image", "text_encoder", "bfloat16"),
    ("z-image", "transformer", "float32"),
    ("z-image", "transformer", "bfloat16"),
    ("stable-diffusion-3", "transformer", "bfloat16"),
    ("qwen-image", "text_encoder", "bfloat16"),
    ("qwen-image", "transformer", "bfloat16"),
    ("qwen-image", "vae_decoder", "bfloat16"),
]


@pytest.fixture(scope="module")
def target() -> Target:
    return rtx_target("8.6")


@pytest.mark.claim("engines", "precision")
@pytest.mark.parametrize(("family", "name", "dtype"), ENGINES)
def test_it_equals_torch_and_is_built(
    family: str, name: str, dtype: str, checkpoint_of: Callable[[str], Path], target: Target, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    (component,) = (each for each in checkpoint.family.components if each.name == name)
    # The module is wrapped in its precision, so that tables of the wrapper stay in float32.
    wrapped = wrap(component, load_module(checkpoint, component).to(getattr(torch, dtype)))
    path = tmp_path / "model.onnx"
    write_onnx(component, capture(component, wrapped, checkpoint.sizes), path)
    parity = compare(component, wrapped.float(), checkpoint.sizes, path, dtype)
    print(f"{family} {name} in {dtype}: {parity.difference:.2g} from torch in float32")
    shapes = Shapes(
        sizes=checkpoint.sizes,
        image_sizes=read_sizes("96x64"),
        rows=2,
        text_padding=32,
        longest_text=longest_text(checkpoint),
        reference_tokens=max_reference_tokens(checkpoint),
    )
    plan = tmp_path / "model.plan"
    build = Build(name=name, onnx=path, dtype=dtype, plan=plan, profiles=profiles(component, shapes), target=target)
    interface = build_plan(build, lambda _: None)
    assert interface.inputs.keys() == {tensor.name for tensor in component.inputs}
    assert plan.stat().st_size > 1000
