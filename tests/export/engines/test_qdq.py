"""Eight bits for TensorRT: what is quantised, how far it is from float32, and that TensorRT-RTX builds it.

Q/DQ graphs are run by OpenVINO in float32, and compared with torch where the same layers round to the same numbers.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino
import pytest
import torch
from onnxscript import ir

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import CALIBRATED, FP8, INT8, Component
from hypergen_export.conversion.convert import Job, convert
from hypergen_export.conversion.examples import as_kwargs, example_inputs
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.parity import SHAPES, Parity, torch_outputs
from hypergen_export.conversion.progress import Progress
from hypergen_export.conversion.wrappers import wrap
from hypergen_export.engines import calibration, ranges
from hypergen_export.engines.accuracy import TOLERANCES, Array, relative_error
from hypergen_export.engines.engine import read_sizes
from hypergen_export.engines.formats import FORMATS
from hypergen_export.engines.profiles import shapes_of
from hypergen_export.engines.qdq import quantize_graph
from hypergen_export.engines.ranges import Ranges, measure_ranges
from hypergen_export.engines.tensorrt import Target, build_plan, rtx_target
from hypergen_export.errors import BadOptionError, ConversionError
from hypergen_export.repository.building import _finish
from hypergen_export.repository.export import export
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.staging import PreviousExport
from hypergen_export.repository.task import ExportTask

from ..conftest import EXPORTED, ForEngines, component_of
from .conftest import make_build

pytestmark = pytest.mark.claim("precision")

TYPES = {INT8: ir.DataType.INT8, FP8: ir.DataType.FLOAT8E4M3FN}
# The first GPUs that have it.
CAPABILITIES = {INT8: "8.0", FP8: "8.9"}
QUANTIZED = [("sd-1", INT8), ("sd-1", FP8), ("sdxl", INT8), ("sdxl", FP8), ("z-image", FP8)]


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_MOST_STEPS", 3)
        yield


def with_small_images(checkpoint: Checkpoint) -> Checkpoint:
    """A transformer's are of 1024 × 1024 otherwise, and calibrated with for minutes."""
    family = checkpoint.family
    return replace(checkpoint, family=replace(family, default_side=256 if family.default_side else 0))


@dataclass(frozen=True)
class Quantized:
    """A denoiser in float32 and its graph with layers of eight bits."""

    checkpoint: Checkpoint
    component: Component
    exact: Path
    onnx: Path
    ranges: Ranges

    @functools.cached_property
    def graph(self) -> ir.Graph:
        return ir.load(self.onnx).graph

    def weights(self) -> dict[str, Any]:
        """The stored weights of each quantised layer."""
        suffix = ".quantized_weight"
        stored = self.graph.initializers
        return {name.removesuffix(suffix): value for name, value in stored.items() if name.endswith(suffix)}


@pytest.fixture(scope="module")
def quantized(
    family_of: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Quantized]:
    @functools.cache
    def make(family: str, dtype: str) -> Quantized:
        folder, repository = family_of(family)
        checkpoint = with_small_images(open_checkpoint(str(folder)))
        denoiser = checkpoint.family.denoiser
        component = component_of(checkpoint, denoiser.name) if family in EXPORTED else denoiser
        exact = repository / component.name / "1"
        files = Path(shutil.copytree(exact, tmp_path_factory.mktemp(dtype) / "1"))
        shares: list[float] = []
        measured = measure_ranges(checkpoint, component, dtype, shares.append)
        assert shares == [number / 8 for number in range(1, 9)]
        quantize_graph(component, files / "model.onnx", dtype, measured.magnitudes)
        print(f"{family} {dtype}: {len(measured.magnitudes)} layers, error {measured.error:.4f}")
        return Quantized(checkpoint, component, exact / "model.onnx", files / "model.onnx", measured)

    return make


def outputs(found: Quantized, file: Path) -> list[list[Array]]:
    """What OpenVINO computes in float32 for the examples that every export is compared with."""
    engine = compiled(file)
    inputs = (example_inputs(found.component, found.checkpoint.sizes, **shape) for shape in SHAPES)
    results = [
        engine({name: each.numpy() for name, each in as_kwargs(found.component, given).items()}) for given in inputs
    ]
    return [[np.array(result[tensor.name]) for tensor in found.component.outputs] for result in results]


def compiled(file: Path) -> Any:
    """The graph as it is stated, without layers of eight bits, whose sums overflow on a CPU without VNNI."""
    core = openvino.Core()
    properties = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
    return core.compile_model(core.read_model(file), "CPU", properties)


def rounded_in_torch(found: Quantized, dtype: str, magnitudes: Mapping[str, float]) -> list[list[Array]]:
    """What torch computes for them with these layers in eight bits."""
    module = load_module(found.checkpoint, found.component)
    ranges._quantize(dict(module.named_modules()), magnitudes, FORMATS[dtype])
    return torch_outputs(found.component, wrap(found.component, module), found.checkpoint.sizes)


@pytest.mark.parametrize(("family", "dtype"), QUANTIZED)
def test_the_graph_is_as_far_from_float32_as_torch_with_the_same_numbers(
    family: str, dtype: str, quantized: Callable[[str, str], Quantized]
) -> None:
    """Not closer to torch: where a sum is on the edge of two numbers, all layers behind it round otherwise."""
    found = quantized(family, dtype)
    exact = outputs(found, found.exact)
    ours = relative_error(exact, outputs(found, found.onnx))
    theirs = relative_error(exact, rounded_in_torch(found, dtype, found.ranges.magnitudes))
    print(f"{family} {dtype}: {ours:.4f} from float32, torch {theirs:.4f}")
    assert 0.01 < found.ranges.error < TOLERANCES[dtype]
    assert 0.01 < ours < TOLERANCES[dtype]
    assert ours == pytest.approx(theirs, rel=0.25)


@pytest.mark.parametrize(("family", "dtype"), QUANTIZED)
def test_one_layer_computes_what_it_does_in_torch_with_the_same_numbers(
    family: str, dtype: str, quantized: Callable[[str, str], Quantized], tmp_path: Path
) -> None:
    found = quantized(family, dtype)
    (name, magnitude), *_ = list(found.ranges.magnitudes.items())[len(found.ranges.magnitudes) // 2 :]
    files = Path(shutil.copytree(found.exact.parent, tmp_path / "1"))
    quantize_graph(found.component, files / "model.onnx", dtype, {name: magnitude})
    given = outputs(found, files / "model.onnx")
    ours = relative_error(rounded_in_torch(found, dtype, {name: magnitude}), given)
    of_float32 = relative_error(outputs(found, found.exact), given)
    print(f"{family} {dtype}: {name} is {ours:.2g} from torch in {dtype}, {of_float32:.2g} from float32")
    # Numbers on the edge of two may be rounded otherwise; and OpenVINO rounds to fp8 by way of float16.
    assert ours < of_float32 / (4 if dtype == FP8 else 20)


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.layer(self.layer(given)))


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_stored_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, given, onnx = Twice().eval(), torch.randn(4, 8), tmp_path / "model.onnx"
    torch.onnx.export(module, (given,), onnx, dynamo=True, optimize=False, external_data=False, verbose=False)
    magnitudes = {"layer": 3.0}
    quantize_graph(checkpoint.family.denoiser, onnx, INT8, magnitudes)
    (ours,) = compiled(onnx)(given.numpy()).values()
    ranges._quantize(dict(module.named_modules()), magnitudes, FORMATS[INT8])
    np.testing.assert_allclose(ours, module(given).numpy(), atol=1e-5)
    operators = Counter(node.op_type for node in ir.load(onnx).graph)
    assert (operators["QuantizeLinear"], operators["DequantizeLinear"]) == (2, 3)


@pytest.mark.parametrize(("family", "dtype"), QUANTIZED)
def test_each_layer_reads_and_holds_eight_bits_but_those_that_its_family_keeps(
    family: str, dtype: str, quantized: Callable[[str, str], Quantized]
) -> None:
    found = quantized(family, dtype)
    module = load_module(found.checkpoint, found.component)
    layers = {
        name: layer.get_parameter("weight")
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    weights = found.weights()
    kept = layers.keys() - weights.keys()
    assert kept == {name for name in layers if found.component.keeps(f"{name}.weight", dtype)}
    sides = {"unet": {"conv_in", "conv_out", "time_embedding.linear_1"}, "transformer": {"t_embedder.mlp.0"}}
    assert sides[found.component.name] <= kept
    assert len(weights) > 2 * len(kept)
    for value in weights.values():
        (user,) = {usage.node for usage in value.uses()}
        assert (value.dtype, user.op_type) == (TYPES[dtype], "DequantizeLinear")
        for usage in user.outputs[0].uses():
            reader: Any = usage.node.inputs[0].producer()
            assert reader.op_type == "DequantizeLinear"
            assert reader.inputs[0].producer().outputs[0].dtype == TYPES[dtype]


@pytest.mark.parametrize("dtype", CALIBRATED)
def test_weights_take_a_byte_and_are_within_half_a_step_of_the_checkpoints(
    dtype: str, quantized: Callable[[str, str], Quantized]
) -> None:
    found = quantized("sdxl", dtype)
    weights = load_module(found.checkpoint, found.component).state_dict()
    stored, constants = found.weights(), cast(Mapping[str, Any], found.graph.initializers)
    for name, value in stored.items():
        numbers = torch.from_numpy(value.const_value.numpy().astype(np.float32))
        scales = torch.tensor(constants[f"{name}.weight_scales"].const_value.numpy())
        (user,) = (usage.node for usage in value.uses())
        numbers = numbers.movedim(user.attributes.get_int("axis"), 0)
        given = weights[f"{name}.weight"]
        assert numbers.shape == given.shape
        columns = scales.reshape(-1, *[1] * (given.ndim - 1))
        step = columns if dtype == INT8 else torch.maximum(columns * 2.0**-9, given.abs() / 8)
        assert ((numbers * columns - given).abs() <= step * 0.51).all(), name
    bytes_stored = (found.onnx.parent / f"model.onnx.{dtype}.safetensors").stat().st_size
    elements = sum(weights[f"{name}.weight"].numel() for name in stored)
    assert elements < bytes_stored < elements + 200 * len(stored)


@pytest.mark.claim("engines")
@pytest.mark.parametrize("dtype", CALIBRATED)
def test_tensorrt_builds_it(dtype: str, quantized: Callable[[str, str], Quantized], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = quantized("sdxl", dtype)
    shapes = shapes_of(found.checkpoint, read_sizes("64x64"), rows=2)
    target = rtx_target(CAPABILITIES[dtype])
    build = make_build(found.component, found.onnx, tmp_path / "model.plan", shapes, target, dtype=dtype)
    interface = build_plan(build, lambda _: None)
    assert interface.inputs.keys() == {tensor.name for tensor in found.component.inputs}
    assert build.plan.stat().st_size > 1000


def job_of(dtype: str, checkpoint: Checkpoint, folder: Path) -> Job:
    """The denoiser's in an export to the empty `folder`; the other components are those of an export in bfloat16."""
    target = rtx_target(CAPABILITIES[dtype])
    request = ExportRequest(model=str(checkpoint.folder), output=folder, engine="tensorrt", dtype=dtype)
    task = ExportTask(checkpoint, request, PreviousExport(folder, {}), read_sizes("64x64"), target)
    component = checkpoint.family.denoiser
    assert [each.name for each in task.components if task.is_quantized(each)] == [component.name]
    assert {task.weights_dtype(each) for each in task.components} == {"bfloat16"}
    onnx = folder / "1" / "model.onnx"
    return Job(component=component, dtype="bfloat16", onnx=onnx, finish=_finish(task, component))


def held(job: Job, dtype: str, parity: Parity | None) -> None:
    """Of a job that is done."""
    assert parity
    print(f"{job.component.name} {dtype}: error {parity.difference:.4f}")
    assert 0.01 < parity.difference < TOLERANCES[dtype] == parity.tolerance
    assert sorted(path.name for path in job.onnx.parent.iterdir()) == ["model.plan", "model.plan.json"]
    assert json.loads(job.onnx.with_name("model.plan.json").read_text())["dtype"] == dtype


@pytest.mark.claim("engines")
def test_an_export_converts_in_bfloat16_calibrates_quantises_and_builds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    job = job_of(INT8, checkpoint, tmp_path)
    job.onnx.parent.mkdir()
    with closing(Progress(0)) as progress:
        held(job, INT8, convert(checkpoint, [job], progress)[job.component.name])


@pytest.mark.claim("engines")
def test_a_transformer_in_bfloat16_is_calibrated_quantised_and_built(
    for_engines: Callable[[str, str, str], ForEngines], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    converted = for_engines("z-image", "transformer", "bfloat16")
    job = job_of(FP8, with_small_images(converted.checkpoint), tmp_path)
    shutil.copytree(converted.onnx.parent, job.onnx.parent)
    assert job.finish
    held(job, FP8, job.finish(job, lambda _: None))


def test_a_layer_that_the_graph_does_not_have_is_named(
    quantized: Callable[[str, str], Quantized], tmp_path: Path
) -> None:
    found = quantized("sd-1", INT8)
    onnx = Path(shutil.copyfile(found.exact, tmp_path / "model.onnx"))
    with pytest.raises(ConversionError, match=r"^unet: its graph lacks 1 of its layers, such as mid_block\.other$"):
        quantize_graph(found.component, onnx, INT8, {**found.ranges.magnitudes, "mid_block.other": 1.0})
    assert onnx.read_bytes() == found.exact.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "capability", "says"),
    [
        (INT8, "7.5", "8.0 or later, but the target GPU has 7.5; use float16"),
        (FP8, "7.5", "8.9 or later, but the target GPU has 7.5; use float16"),
        (FP8, "8.6", "8.9 or later, but the target GPU has 8.6; use bfloat16 or, for a UNet, int8"),
    ],
)
def test_a_gpu_without_such_numbers_is_refused_before_anything_is_done(
    dtype: str, capability: str, says: str, checkpoint_folder: Path, tmp_path: Path
) -> None:
    request = ExportRequest(model=str(checkpoint_folder), output=tmp_path / "out", engine="tensorrt", dtype=dtype)
    target = Target(library="tensorrt_rtx", version="1.7", gpu="", compute_capability=capability)
    with pytest.raises(BadOptionError, match=f"^--dtype {dtype}: needs a GPU of compute capability {says}$"):
        export(request, target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("sd-1", {"engine": "openvino"}, r"^--dtype fp8: openvino supports float32, bfloat16, int8, int8-weights"),
        ("sd-1", {"lora_rank": 8}, r"^--lora-rank, --lora-dir: not with --dtype fp8"),
        ("sd-1", {"deep_cache": True}, r"^--deep-cache: not with --dtype fp8"),
        ("sd-inpainting", {}, r"^--dtype fp8: not for stable-diffusion-inpainting models; tensorrt serves them in fl"),
        ("z-image", {"dtype": INT8}, r"^--dtype int8: not for z-image models; tensorrt serves .* bfloat16, fp8$"),
        ("flux1-kontext", {}, r"^--dtype fp8: not for flux1-kontext models; tensorrt serves .* float16, bfloat16$"),
        ("flux2-klein", {}, r"^--dtype fp8: not for flux2-klein models; tensorrt serves .* float16, bfloat16$"),
    ],
)
def test_what_it_is_not_for_is_refused(
    family: str, options: Mapping[str, Any], reason: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    request = {"model": str(checkpoint_of(family)), "engine": "tensorrt", "dtype": FP8, **options}
    with pytest.raises(BadOptionError, match=reason):
        export(ExportRequest(output=tmp_path / "out", **request))
    assert not (tmp_path / "out").exists()
