"""Eight and four bits: what is calibrated with, what stays as it is, and how far the result is from float32."""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import INT4_WEIGHTS, INT8, INT8_WEIGHTS
from hypergen_export.conversion.parity import Parity
from hypergen_export.engines import calibration
from hypergen_export.engines.accuracy import TOLERANCES, check_error, relative_error
from hypergen_export.engines.quantization import Calls, quantize, require_nncf
from hypergen_export.errors import BadOptionError, MissingDependencyError, ParityMissedError
from hypergen_export.repository.config_pbtxt import read_config
from hypergen_export.repository.export import ExportResult, export
from hypergen_export.repository.request import ExportRequest
from hypergen_gateway.embedded.backends.openvino.compilations import Compilations
from support.pipelines import pipeline_of

from ..conftest import COMPONENTS

UNET = COMPONENTS["unet"]
PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32"}
CALIBRATION_CALLS = 8
# The weights of so few bits in an IR.
BITS = {INT8: "i8", INT8_WEIGHTS: "u8", INT4_WEIGHTS: "u4"}


@pytest.fixture(scope="module")
def onnx(repository: Path) -> Path:
    return repository / "unet" / "1" / "model.onnx"


@pytest.fixture(scope="module")
def recorded(checkpoint: Checkpoint, onnx: Path) -> Calls:
    shares: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_MOST_CALLS", CALIBRATION_CALLS)
        recorded = calibration.denoiser_calls(checkpoint, UNET, onnx, shares.append)
    assert shares[-1] == 1
    return recorded


@pytest.fixture(scope="module")
def calls(recorded: Calls) -> Calls:
    return Calls(calibration=recorded.calibration, held_out=recorded.held_out[::5])


def test_the_engine_of_the_recorded_images_is_freed_at_once(
    checkpoint: Checkpoint, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a model of Stable Diffusion 1.5's size has gigabytes, and the next is compiled directly after it."""
    monkeypatch.setattr(calibration, "IMAGES", calibration.HELD_OUT + 1)
    monkeypatch.setattr(calibration, "_MOST_STEPS", 2)
    before = engines_in_memory()
    gc.disable()
    try:
        calibration.denoiser_calls(checkpoint, UNET, onnx, lambda _: None)
        assert engines_in_memory() == before
    finally:
        gc.enable()


def engines_in_memory() -> int:
    return sum(isinstance(each, openvino.CompiledModel) for each in gc.get_objects())


@dataclass(frozen=True)
class Int8:
    """An export in int8 beside the components of one in float32, and what it said."""

    request: ExportRequest
    result: ExportResult
    told: list[str]

    @property
    def unet(self) -> Path:
        return self.request.output / "unet"


@pytest.fixture(scope="module")
def int8(checkpoint_folder: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Int8:
    output = Path(shutil.copytree(repository, tmp_path_factory.mktemp("int8") / "repository"))
    request = ExportRequest(model=str(checkpoint_folder), output=output, max_batch_size=4, dtype=INT8)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_MOST_CALLS", CALIBRATION_CALLS)
        return Int8(request, export(request, notify=told.append), told)


Quantized = Callable[[str], tuple[Path, Parity]]


@pytest.fixture(scope="module")
def quantized(int8: Int8, onnx: Path, calls: Calls, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The UNet's IR in a precision, and its error."""

    @functools.cache
    def make(dtype: str) -> tuple[Path, Parity]:
        if dtype == INT8:
            record = json.loads((int8.request.output / "hypergen.json").read_text())
            return int8.unet / "1" / "model.xml", Parity(**record["components"]["unet"]["parity"])
        folder = Path(shutil.copytree(onnx.parent, tmp_path_factory.mktemp(dtype) / "1"))
        shares: list[float] = []
        parity = quantize(UNET, dtype, folder / "model.onnx", calls, shares.append)
        assert shares == sorted(shares)
        assert all(share <= 1 for share in shares)
        return folder / "model.xml", parity

    return make


def weights(file: Path) -> Mapping[str, str]:
    """Name -> type of the constants of an IR."""
    nodes = openvino.Core().read_model(file).get_ordered_ops()
    return {
        node.get_friendly_name(): node.get_output_element_type(0).get_type_name()
        for node in nodes
        if node.get_type_name() == "Constant" and node.get_output_size() == 1
    }


def test_a_recorded_call_is_what_diffusers_calls_its_unet_with(checkpoint: Checkpoint, calls: Calls) -> None:
    pipeline = pipeline_of(checkpoint.folder)
    seen: list[dict[str, Any]] = []
    forward = pipeline.unet.forward

    def record(sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any) -> Any:
        time = pipeline.unet.time_proj(timestep.expand(len(sample)))
        seen.append({"sample": sample, "time": time, "encoder_hidden_states": encoder_hidden_states})
        return forward(sample, timestep, encoder_hidden_states, **rest)

    pipeline.unet.forward = record
    prompt, steps, size = calibration._PROMPTS[0], calibration._MOST_STEPS, 8 * calls.held_out[0]["sample"].shape[-1]
    generator = torch.Generator().manual_seed(0)
    pipeline(prompt, num_inference_steps=steps, width=size, height=size, generator=generator, output_type="latent")
    ours, theirs = calls.calibration[0], seen[0]
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name].numpy()[:1], rtol=0, atol=1e-5)
    # Later latents have passed through our UNet, in bfloat16.
    np.testing.assert_array_equal(calls.calibration[1]["time"], seen[8]["time"].numpy()[:1])


def test_every_step_is_recorded_with_and_without_its_prompt(recorded: Calls) -> None:
    middle = len(recorded.held_out) // 2
    halves = [recorded.held_out[:middle], recorded.held_out[middle:]]
    for one, other in zip(*halves, strict=True):
        np.testing.assert_array_equal(one["time"], other["time"])
    without = halves[0][0]["encoder_hidden_states"]
    for image, calls in enumerate(halves):
        unguided = [np.array_equal(call["encoder_hidden_states"], without) for call in calls]
        assert unguided == [(image + step) % 2 == 0 for step in range(len(calls))]


def test_an_export_in_int8_quantises_the_unet_and_takes_over_the_rest(int8: Int8) -> None:
    assert int8.result == ExportResult(converted=("unet",), reused=("text_encoder", "vae_decoder", "vae_encoder"))
    (told,) = int8.told
    assert re.fullmatch(r"unet in int8 differs from float32 by 0\.\d+ of its output \(limit 0\.15\)", told)
    config = read_config((int8.unet / "config.pbtxt").read_text())
    assert config.default_model_filename == "model.xml"
    assert config.parameters["HINT_BF16"].string_value == "NO"
    assert export(int8.request) == ExportResult(), "calibrated once"


@pytest.mark.parametrize("dtype", BITS)
def test_a_quantised_unet_is_near_float32_and_small(dtype: str, quantized: Quantized) -> None:
    file, parity = quantized(dtype)
    print(f"{dtype}: {parity.difference:.4f}")
    assert parity.difference < TOLERANCES[dtype] == parity.tolerance
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.bin", "model.xml"], "no weights are linked"
    kinds = list(weights(file).values())
    assert kinds.count(BITS[dtype]) > 10


def test_no_sum_of_products_overflows_on_a_cpu_without_vnni(quantized: Quantized) -> None:
    """Such a CPU adds the products of two pairs in sixteen bits, and would keep the largest number in silence."""
    nodes = openvino.Core().read_model(quantized(INT8)[0]).get_ordered_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    stored = [each.data for each in constants if each.get_output_element_type(0).get_type_name() == "i8"]
    assert len(stored) > 10
    assert 2 * 255 * max(abs(each.astype(int)).max() for each in stored) < 2**15


def test_no_activation_of_any_step_is_cut_off(calls: Calls, int8: Int8) -> None:
    """What layers read is larger at some steps than at others: the mean of their extremes would be too small."""
    model = openvino.Core().read_model(int8.unet / "1" / "model.xml")
    rounded = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    highest = [node.input_value(2).get_node().data.max() for node in rounded]
    model = openvino.Model([node.input_value(0) for node in rounded], model.get_parameters())
    engine = openvino.Core().compile_model(model, "CPU", PROPERTIES)
    seen = np.max([[array.max() for array in engine(call).values()] for call in calls.calibration], axis=0)
    assert len(highest) > 10
    # What comes before a layer is rounded, too.
    assert np.max(seen / highest) < 1.1


@pytest.mark.parametrize("dtype", BITS)
def test_the_layers_that_a_family_lists_keep_their_weights(dtype: str, quantized: Quantized) -> None:
    kinds = weights(quantized(dtype)[0])
    named = {name.removeprefix("unet."): kind for name, kind in kinds.items() if name.endswith(".weight")}
    listed = {name: kind for name, kind in named.items() if UNET.keeps(name, dtype)}
    assert {"conv_in.weight", "conv_out.weight"} <= listed.keys()
    assert set(listed.values()) == {"f32"}


def test_the_backend_serves_it_for_any_rows_and_size(onnx: Path, calls: Calls, quantized: Quantized) -> None:
    call = calls.held_out[0]
    wide = {**call, "sample": np.concatenate([call["sample"]] * 2, axis=3)}
    three = {name: np.concatenate([array, array[:1]]) for name, array in wide.items()}
    ours, exact = (Compilations(file, PROPERTIES) for file in (quantized(INT8)[0], onnx))
    for given in (call, three):
        names = ["model_output"]
        expected = np.array(exact.find(given).infer(given, names)["model_output"])
        got = ours.find(given).infer(given, names)["model_output"]
        assert got.shape == expected.shape
        assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < TOLERANCES[INT8]
    ours.close()
    exact.close()


@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_a_transformers_weights_have_four_bits(
    name: str, family_of: Callable[[str], tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, repository = family_of("z-image")
    checkpoint = open_checkpoint(str(folder))
    component = next(each for each in checkpoint.family.components if each.name == name)
    files = Path(shutil.copytree(repository / name / "1", tmp_path / "1"))
    calls = calibration.example_calls(component, checkpoint.sizes)
    parity = quantize(component, INT4_WEIGHTS, files / "model.onnx", calls, lambda _: None)
    assert caplog.handler.level == logging.NOTSET, "later tests would miss warnings"
    print(f"{name}: {parity.difference:.4f}")
    assert 0 < parity.difference < TOLERANCES[INT4_WEIGHTS]
    assert BITS[INT4_WEIGHTS] in weights(files / "model.xml").values()


@pytest.mark.parametrize("difference", [0.4, math.nan])
def test_a_model_that_loses_too_much_is_refused(difference: float) -> None:
    with pytest.raises(ParityMissedError, match=r"^unet: in int4-weights it differs from float32 by .* limit is 0.3"):
        check_error(UNET, INT4_WEIGHTS, difference)


def test_the_error_is_that_of_the_worst_output_also_where_none_is_a_number() -> None:
    one, none = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    expected = [[one, one], [one, one]]
    assert relative_error(expected, [[one, one], [one, one * 2]]) == math.sqrt(0.5)
    assert math.isnan(relative_error(expected, [[one, one], [one, one * math.nan]]))
    assert relative_error([[none]], [[none]]) == 0


def test_without_nncf_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependencyError, match=r"--dtype int8 needs: pip install 'hypergen-triton\[int8\]'$"):
        require_nncf(INT8)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("sd-1", {"lora_rank": 8}, r"^--lora-rank, --lora-dir: not with --dtype int8"),
        ("sd-1", {"deep_cache": True}, r"^--deep-cache: not with --dtype int8"),
        ("sd-inpainting", {}, r"^--dtype int8: not for stable-diffusion-inpainting models; openvino serves them in fl"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(
    family: str, options: dict[str, Any], reason: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(open_checkpoint(str(checkpoint_of(family))).folder)
    with pytest.raises(BadOptionError, match=reason):
        export(ExportRequest(model=model, output=tmp_path / "out", dtype=INT8, **options))
    assert not (tmp_path / "out").exists()
