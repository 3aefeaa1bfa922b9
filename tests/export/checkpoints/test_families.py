"""Components that only some families have, exported and in OpenVINO, against torch at shapes nobody traced.

XL and latent consistency are exported whole for tests/end_to_end, and looked at here. Of the other families only the
components whose graphs differ from these and from 1.x are converted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.conversion.examples import as_kwargs, example_inputs
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.wrappers import wrap

from ..conftest import CONVERTED, EXPORTED, Converted, component_of

# Of the largest value. Seen: below 1e-6.
PARITY = 1e-5
# Of the root mean square, in float16.
PARITY_IN_HALF_PRECISION = 5e-3


@pytest.mark.parametrize("family", EXPORTED)
def test_an_export_agrees_with_torch_to_rounding(family: str, family_of: Callable[[str], tuple[Path, Path]]) -> None:
    _, repository = family_of(family)
    components = json.loads((repository / "hypergen.json").read_text())["components"]
    parity = {name: entry["parity"]["difference"] for name, entry in components.items()}
    print(family, {name: f"{difference:.1e}" for name, difference in parity.items()})
    assert tuple(parity) == EXPORTED[family]
    assert parity.pop("vae_decoder") <= 1
    assert max(parity.values()) <= PARITY


@pytest.mark.parametrize("family", CONVERTED)
def test_a_component_of_another_graph_agrees_with_torch_to_rounding(
    family: str, converted: Callable[[str], Converted]
) -> None:
    found = converted(family)
    assert tuple(found.differences) == CONVERTED[family]
    print(family, found.dtype, {name: f"{difference:.1e}" for name, difference in found.differences.items()})
    assert max(found.differences.values()) <= (PARITY if found.dtype == "float32" else PARITY_IN_HALF_PRECISION)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (5, 13, 6), (17, 3, 5)])
@pytest.mark.parametrize(
    ("family", "name"),
    [("sdxl", "text_encoder_2"), ("sdxl", "unet"), ("sdxl", "unet_shallow"), ("lcm", "unet"), ("lcm", "unet_shallow")],
)
def test_batch_height_and_width_are_free(
    family: str, name: str, batch: int, height: int, width: int, family_of: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, repository = family_of(family)
    checkpoint = open_checkpoint(str(folder))
    component = component_of(checkpoint, name)
    inputs = as_kwargs(component, example_inputs(component, checkpoint.sizes, batch=batch, height=height, width=width))
    expected = wrap(component, load_module(checkpoint, component))(**inputs)
    ours = run(repository / name / "1" / "model.onnx", {key: tensor.numpy() for key, tensor in inputs.items()})
    for tensor, theirs in zip(component.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert ours[tensor.name].shape == theirs.shape
        np.testing.assert_allclose(ours[tensor.name], theirs.numpy(), atol=1e-4, rtol=0)


def test_each_component_of_xl_declares_the_tables_tensors(family_of: Callable[[str], tuple[Path, Path]]) -> None:
    folder, repository = family_of("sdxl")
    checkpoint = open_checkpoint(str(folder))
    for component in with_deep_cache(checkpoint.family.components):
        config: Any = text_format.Parse((repository / component.name / "config.pbtxt").read_text(), pb.ModelConfig())
        for declared, tensors in [(config.input, component.inputs), (config.output, component.outputs)]:
            expected = {tensor.name: list(tensor.dims(checkpoint.sizes)) or [1] for tensor in tensors}
            assert {entry.name: list(entry.dims) for entry in declared} == expected


def run(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(inputs)
    return {output.any_name: np.asarray(results[output]) for output in compiled.outputs}
