"""Components of transformer families: ONNX against torch in both precisions, and TensorRT-RTX engines of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import POOL_FILE, LoraPool
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.checkpoints.weights import stored_tensors
from hypergen_export.conversion.layer_names import has_matrix
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.engines.engine import read_sizes
from hypergen_export.engines.profiles import Shapes, shapes_of
from hypergen_export.engines.tensorrt import Target, build_plan
from support.loras import lora_weights, save_by_diffusers

from ..conftest import ForEngines, component_of, convert_component
from .conftest import make_build

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.claim("engines", "precision")

# In bfloat16. Families that share a component's architecture are built once.
ENGINES = [
    ("flux1-dev", "text_encoder_2"),
    ("flux1-kontext", "transformer"),
    ("chroma", "transformer"),
    ("flux2-klein", "vae_decoder"),
    ("flux2-klein", "vae_encoder"),
    ("z-image", "text_encoder"),
    ("z-image", "transformer"),
    ("stable-diffusion-3", "transformer"),
    ("qwen-image", "text_encoder"),
    ("qwen-image", "transformer"),
    ("qwen-image", "vae_decoder"),
    ("sana-1.5", "text_encoder"),
    ("sana-1.5", "transformer"),
    ("sana-1.5", "vae_decoder"),
    ("sana-1.5", "vae_encoder"),
    ("sana-sprint", "transformer"),
]
# With a rank pool, one of them: its branches are the same beside every linear layer.
POOLED = "flux2-klein"
POOL = LoraPool(rank=8, kernels=True)
HAVE_POOLS = (POOLED, "flux1-dev", "chroma", "z-image", "stable-diffusion-3", "qwen-image", "sana")


def shapes(checkpoint: Checkpoint) -> Shapes:
    return shapes_of(checkpoint, read_sizes("96x64"), rows=2)


@pytest.mark.parametrize(("family", "name"), ENGINES)
def test_it_equals_torch_and_is_built(
    family: str, name: str, for_engines: Callable[[str, str, str], ForEngines], target: Target, tmp_path: Path
) -> None:
    found = for_engines(family, name, "bfloat16")
    print(f"{family} {name}: {found.difference:.2g} from torch in float32")
    sizes = shapes(found.checkpoint)
    build = make_build(found.component, found.onnx, tmp_path / "model.plan", sizes, target, dtype="bfloat16")
    interface = build_plan(build, lambda _: None)
    assert interface.inputs.keys() == {tensor.name for tensor in found.component.inputs}
    assert build.plan.stat().st_size > 1000


def test_a_transformer_with_a_rank_pool_equals_torch_and_is_built(
    checkpoint_of: Callable[[str], Path], target: Target, tmp_path: Path
) -> None:
    """It is compared with random weights in the pool, then the LoRA takes their place, and the plan holds it."""
    folder = checkpoint_of(POOLED)
    checkpoint = open_checkpoint(str(folder))
    component, onnx = checkpoint.family.denoiser.with_pool(POOL), tmp_path / "model.onnx"
    file = save_by_diffusers(tmp_path / "ink", lora_weights(folder, "transformer"))
    placements = [Placement(Lora(name="ink", file=file), (4, 5, 6, 7))]
    parity = convert_component(checkpoint, component, onnx, "bfloat16", casts=True, placements=placements)
    print(f"{POOLED}: {parity.difference:.2g} from torch in float32")
    build = make_build(component, onnx, tmp_path / "model.plan", shapes(checkpoint), target, dtype="bfloat16")
    interface = build_plan(build, lambda _: None)
    assert interface.inputs["lora_scales"].shape == (-1, 8)
    assert build.plan.stat().st_size > 1000


@pytest.mark.parametrize("family", HAVE_POOLS)
def test_every_layer_of_a_transformer_is_in_its_pool(
    family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    module = load_module(checkpoint, checkpoint.family.denoiser)
    PoolWeights(tmp_path).create("transformer", module, POOL, torch.bfloat16)
    layers = [path for path, layer in module.named_modules() if has_matrix(layer)]
    pooled = {f"lora_pool.{path}.{part}" for path in layers for part in ("down", "up")}
    assert stored_tensors(tmp_path / POOL_FILE).keys() == pooled


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
