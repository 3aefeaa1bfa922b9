"""Components of transformer families: ONNX against torch in both precisions, and TensorRT-RTX engines of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import POOL_FILE, LoraPool
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.checkpoints.weights import stored_tensors
from hypergen_export.conversion.layer_names import has_matrix
from hypergen_export.conversion.loading import load_module
from hypergen_export.engines.engine import read_sizes
from hypergen_export.engines.profiles import Shapes, shapes_of
from hypergen_export.engines.tensorrt import Target, build_plan
from support.loras import lora_weights, save_by_diffusers

from ..conftest import component_of, convert_component
from .conftest import make_build

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.claim("engines", "precision")

# In bfloat16. Families that share a component's architecture are built once, most transformers with a rank pool, which
# holds a LoRA: without one, a graph has the same operators and fewer of them.
ENGINES = [
    ("flux1-dev", "text_encoder_2"),
    ("flux1-kontext", "transformer"),
    ("flux2-klein", "vae_decoder"),
    ("flux2-klein", "vae_encoder"),
    ("z-image", "text_encoder"),
    ("qwen-image", "text_encoder"),
    ("qwen-image", "vae_decoder"),
]
POOLED = ("flux1-dev", "flux2-klein", "z-image", "stable-diffusion-3", "qwen-image")


def shapes(checkpoint: Checkpoint) -> Shapes:
    return shapes_of(checkpoint, read_sizes("96x64"), rows=2)


@pytest.mark.parametrize(("family", "name"), ENGINES)
def test_it_equals_torch_and_is_built(
    family: str, name: str, checkpoint_of: Callable[[str], Path], target: Target, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    component, onnx = component_of(checkpoint, name), tmp_path / "model.onnx"
    parity = convert_component(checkpoint, component, onnx, "bfloat16")
    print(f"{family} {name}: {parity.difference:.2g} from torch in float32")
    build = make_build(component, onnx, tmp_path / "model.plan", shapes(checkpoint), target, dtype="bfloat16")
    interface = build_plan(build, lambda _: None)
    assert interface.inputs.keys() == {tensor.name for tensor in component.inputs}
    assert build.plan.stat().st_size > 1000


@pytest.mark.parametrize("family", POOLED)
def test_a_transformer_with_a_rank_pool_equals_torch_and_is_built(
    family: str, checkpoint_of: Callable[[str], Path], target: Target, tmp_path: Path
) -> None:
    """It is compared with random weights in the pool, then the LoRA takes their place, and the plan holds it."""
    folder = checkpoint_of(family)
    checkpoint = open_checkpoint(str(folder))
    component, onnx = checkpoint.family.denoiser.with_pool(LoraPool(rank=8, kernels=True)), tmp_path / "model.onnx"
    file = save_by_diffusers(tmp_path / "ink", lora_weights(folder, "transformer"))
    placements = [Placement(Lora(name="ink", file=file), (4, 5, 6, 7))]
    parity = convert_component(checkpoint, component, onnx, "bfloat16", casts=True, placements=placements)
    print(f"{family}: {parity.difference:.2g} from torch in float32")
    build = make_build(component, onnx, tmp_path / "model.plan", shapes(checkpoint), target, dtype="bfloat16")
    interface = build_plan(build, lambda _: None)
    assert interface.inputs["lora_scales"].shape == (-1, 8)
    layers = [path for path, layer in load_module(checkpoint, component).named_modules() if has_matrix(layer)]
    pooled = {f"lora_pool.{path}.{part}" for path in layers for part in ("down", "up")}
    assert stored_tensors(onnx.with_name(POOL_FILE)).keys() == pooled
    assert build.plan.stat().st_size > 1000


def test_what_openvino_serves_in_float32_is_built(
    family_of: Callable[[str], tuple[Path, Path]], target: Target, tmp_path: Path
) -> None:
    folder, repository = family_of("z-image")
    checkpoint = open_checkpoint(str(folder))
    component, onnx = component_of(checkpoint, "transformer"), repository / "transformer" / "1" / "model.onnx"
    build = make_build(component, onnx, tmp_path / "model.plan", shapes(checkpoint), target)
    interface = build_plan(build, lambda _: None)
    assert interface.inputs.keys() == {tensor.name for tensor in component.inputs}
    assert build.plan.stat().st_size > 1000
