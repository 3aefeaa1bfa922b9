"""The exported files in the engine that serves them, against torch, at shapes nobody traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxscript import ir
from onnxscript.rewriter import rewrite

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.families.unet import STABLE_DIFFUSION
from hypergen_export.conversion.examples import example_inputs
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.wrappers import wrap

from ..conftest import COMPONENTS, Run

ONNX_TYPES = {"FP32": onnx.TensorProto.FLOAT, "INT32": onnx.TensorProto.INT32, "UINT8": onnx.TensorProto.UINT8}


@pytest.mark.parametrize("component", STABLE_DIFFUSION, ids=lambda component: component.name)
def test_the_file_has_the_tables_inputs_and_outputs(
    component: Component, checkpoint: Checkpoint, repository: Path
) -> None:
    graph = onnx.load(repository / component.name / "1" / "model.onnx").graph
    for found, expected in [(graph.input, component.inputs), (graph.output, component.outputs)]:
        assert [value.name for value in found] == [tensor.name for tensor in expected]
        for value, tensor in zip(found, expected, strict=True):
            assert value.type.tensor_type.elem_type == ONNX_TYPES[tensor.dtype]
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
            assert dims == [-1, *tensor.dims(checkpoint.sizes)]


@pytest.mark.parametrize("family", ["sd-1", "stable-diffusion-3", "z-image"])
def test_the_other_rules_of_onnxscript_would_find_nothing(
    family: str, family_of: Callable[[str], tuple[Path, Path]]
) -> None:
    files = list(family_of(family)[1].glob("*/1/model.onnx"))
    assert len(files) >= len(STABLE_DIFFUSION)
    for file in files:
        model = ir.load(file)
        before = Counter(node.op_type for node in model.graph)
        rewrite(model)
        assert Counter(node.op_type for node in model.graph) == before, file.parents[1].name


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 9, 7), (5, 13, 6), (17, 3, 5), (70, 4, 4)])
@pytest.mark.parametrize("component", STABLE_DIFFUSION, ids=lambda component: component.name)
def test_batch_height_and_width_are_free(
    component: Component,
    batch: int,
    height: int,
    width: int,
    checkpoint: Checkpoint,
    engine: Callable[[str], Run],
) -> None:
    inputs = example_inputs(component, checkpoint.sizes, batch=batch, height=height, width=width)
    expected = wrap(component, load_module(checkpoint, component))(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs in zip(engine(component.name)(*inputs), expected, strict=True):
        tolerance = 1 if theirs.numpy().dtype == np.uint8 else 1e-4
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.astype(np.float64), theirs.numpy().astype(np.float64), atol=tolerance, rtol=0)


def test_a_sample_does_not_depend_on_its_neighbours(checkpoint: Checkpoint, engine: Callable[[str], Run]) -> None:
    inputs = example_inputs(COMPONENTS["unet"], checkpoint.sizes, batch=4, height=8, width=8)
    unet = engine("unet")
    together = unet(*inputs)[0]
    alone = np.concatenate([unet(*(tensor[i : i + 1] for tensor in inputs))[0] for i in range(4)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_decoders_parity_is_of_bytes_that_rarely_differ(
    checkpoint: Checkpoint, engine: Callable[[str], Run]
) -> None:
    """One level is allowed where a value lies on the edge of two, but only there."""
    component = COMPONENTS["vae_decoder"]
    inputs = example_inputs(component, checkpoint.sizes, batch=2, height=16, width=16)
    expected = wrap(component, load_module(checkpoint, component))(*inputs)[0].numpy()
    image = engine(component.name)(*inputs)[0]
    assert (image != expected).mean() < 1e-3
    assert expected.std() > 10


def test_an_image_that_overflows_has_a_mean_that_is_not_finite(engine: Callable[[str], Run]) -> None:
    """In bytes, it is as black as a black one. The others of its batch are as they are alone."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[1] *= 1e38
    decoder = engine("vae_decoder")
    (images, means), alone = decoder(latents), decoder(latents[::2])
    assert np.isfinite(means[:, 0]).tolist() == [True, False, True]
    assert images[1].max() == 0
    assert np.abs(images[::2].astype(int) - alone[0]).max() <= 1
