"""What the OpenVINO backend compiles, and that a model gives the same whatever it was compiled for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops
from openvino._offline_transformations import apply_moc_transformations

from hypergen_gateway.embedded.backends.openvino import compilations
from hypergen_gateway.embedded.backends.openvino.compilations import (
    EXACT_ROWS,
    Array,
    Compilation,
    Compilations,
    ExactShapes,
)
from hypergen_gateway.embedded.backends.openvino.flattening import flatten_channel_scales
from hypergen_gateway.embedded.backends.openvino.following import WeightsFollower, served_file, version

CHANNELS, GROUPS = 6, 2
PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}


def group_norm(silu: bool = True, read_twice: bool = False) -> openvino.Model:
    """As torch exports it: groups to rows, MVN, back, scale, shift; [batch, channels, height, width]."""
    chance = np.random.default_rng(0)
    scale, shift = (chance.standard_normal((CHANNELS, 1, 1)).astype(np.float32) for _ in range(2))
    x = ops.parameter([-1, CHANNELS, -1, -1], np.float32, name="x")
    rows = ops.mvn(ops.reshape(x, np.array([0, GROUPS, -1]), True), np.array([2]), True, 1e-5, "INSIDE_SQRT")
    scaled = ops.multiply(ops.reshape(rows, ops.shape_of(x), False), scale)
    y = ops.add(scaled, shift)
    if silu:
        y = ops.multiply(y, ops.sigmoid(y))
    results = [ops.result(y, name="y"), *([ops.result(scaled, name="scaled")] if read_twice else [])]
    return openvino.Model(results, [x], "group_norm")


def run(model: openvino.Model, x: Array) -> Array:
    outputs = openvino.Core().compile_model(model, "CPU", PROPERTIES)({"x": x})
    return np.asarray(outputs[0])


def image(rows: int, height: int = 4, width: int = 4) -> Array:
    return np.random.default_rng(rows).standard_normal((rows, CHANNELS, height, width)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.xml"
    openvino.save_model(group_norm(), path, compress_to_fp16=False)
    return path


def test_full_batches_of_the_usual_size_are_worth_a_compilation() -> None:
    choice = ExactShapes()
    assert choice.includes({"sample": (2, 16, 8, 8), "time": (2, 32)})
    included = {rows for rows in range(1, 33) if choice.includes({"sample": (rows, 16, 8, 8), "time": (rows, 32)})}
    assert included == EXACT_ROWS


def test_no_other_size_is_however_often_it_comes() -> None:
    choice = ExactShapes()
    choice.includes({"sample": (2, 16, 8, 8)})
    assert not any(choice.includes({"sample": (2, 16, 8, 12)}) for _ in range(100))
    assert choice.includes({"sample": (1, 16, 8, 8)})


def test_the_usual_size_is_the_first_whatever_its_rows() -> None:
    choice = ExactShapes()
    assert not choice.includes({"sample": (3, 16, 8, 8)})
    assert choice.includes({"sample": (2, 16, 8, 8)})


def find_exact(model: Compilations, batch: Array) -> Compilation:
    """What serves this batch once its own compilation is made, in the background."""
    general = model.find({"x": image(3, 4, 6)})
    ends = time.monotonic() + 60
    while (found := model.find({"x": batch})) is general:
        assert time.monotonic() < ends
        time.sleep(0.01)
    return found


def test_a_small_model_is_compiled_for_each_exact_shape_and_once_for_all_others(file: Path) -> None:
    model = Compilations(file, PROPERTIES)
    model.find({"x": image(2)})
    for rows in EXACT_ROWS:
        find_exact(model, image(rows))
    batches = [image(rows, *size) for size in ((4, 4), (4, 6), (6, 4)) for rows in range(1, 18)]
    found = {batch.shape: model.find({"x": batch}) for batch in batches}
    assert len({id(each) for each in found.values()}) == len(EXACT_ROWS) + 1
    assert all(model.find({"x": batch}) is found[batch.shape] for batch in batches), "compiled again"


def test_no_call_after_the_warm_up_waits_for_a_compilation(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Compilations(file, PROPERTIES)
    warm = model.find({"x": image(2)})
    may_compile, compile_exact = threading.Event(), Compilations._compile_exact

    def compile_when_allowed(self: Compilations, compiled: Any, shapes: compilations.Shapes) -> Compilation:
        may_compile.wait()
        return compile_exact(self, compiled, shapes)

    monkeypatch.setattr(Compilations, "_compile_exact", compile_when_allowed)
    general = model.find({"x": image(3)})
    assert model.find({"x": image(16)}) is general is not warm
    seen = general.infer({"x": image(16)}, ["y"])["y"]
    np.testing.assert_allclose(seen, run(group_norm(), image(16)), atol=1e-5)
    may_compile.set()
    seen = find_exact(model, image(16)).infer({"x": image(16)}, ["y"])["y"]
    np.testing.assert_allclose(seen, run(group_norm(), image(16)), atol=1e-5)


def test_a_shape_that_cannot_be_compiled_is_served_by_the_general_compilation(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Compilations(file, PROPERTIES)
    model.find({"x": image(2)})

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Compilations, "_compile", fail)
    general = model.find({"x": image(3)})
    assert model.find({"x": image(16)}) is general
    ends = time.monotonic() + 60
    while "no memory" not in caplog.text:
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert all(model.find({"x": image(16)}) is general for _ in range(3))
    assert caplog.text.count("Not compiled") == 1


def test_replaced_weights_are_served_while_the_earlier_ones_answer(tmp_path: Path) -> None:
    served = tmp_path / "model.xml"

    def save(model: openvino.Model) -> None:
        openvino.save_model(model, tmp_path / "new.xml", compress_to_fp16=False)
        (tmp_path / "new.bin").replace(served.with_suffix(".bin"))
        (tmp_path / "new.xml").replace(served)

    save(group_norm())
    model = Compilations(served, PROPERTIES)
    reading, may_read = threading.Event(), threading.Event()

    def read_again() -> None:
        reading.set()
        may_read.wait()
        model.read_again()

    before = model.find({"x": image(2)}).infer({"x": image(2)}, ["y"])["y"].copy()
    follower = WeightsFollower(served, version(served), read_again)
    assert served_file(served).read_text() == version(served)
    save(group_norm(silu=False))
    reading.wait(60)
    assert served_file(served).read_text() != version(served)
    np.testing.assert_array_equal(model.find({"x": image(2)}).infer({"x": image(2)}, ["y"])["y"], before)
    may_read.set()
    ends = time.monotonic() + 60
    while served_file(served).read_text() != version(served):
        assert time.monotonic() < ends
        time.sleep(0.01)
    seen = model.find({"x": image(2)}).infer({"x": image(2)}, ["y"])["y"]
    np.testing.assert_allclose(seen, run(group_norm(silu=False), image(2)), atol=1e-5)
    follower.close()


def test_a_large_model_is_compiled_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations, "SMALL_BYTES", 0)
    model = Compilations(file, PROPERTIES)
    assert model.find({"x": image(1)}) is model.find({"x": image(2, 6, 4)})


def test_what_comes_out_depends_on_no_compilation(file: Path) -> None:
    model = Compilations(file, PROPERTIES)
    model.find({"x": image(2)})
    general = model.find({"x": image(3)})
    for batch in (image(2), image(3), image(2, 4, 6), image(16)):
        for compilation in (model.find({"x": batch}), general):
            seen = compilation.infer({"x": batch}, ["y"])["y"]
            np.testing.assert_allclose(seen, run(group_norm(), batch), atol=1e-5)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("for_nncf", [True, False])
def test_channels_are_scaled_over_flattened_height_and_width(silu: bool, for_nncf: bool) -> None:
    model, batch = group_norm(silu), image(2, 4, 6)
    if for_nncf:
        # An IR of int8 has a leading 1 in its constants, and SiLU as one operation.
        apply_moc_transformations(model, False, False)
        assert silu == any(node.get_type_name() == "Swish" for node in model.get_ops())
    assert flatten_channel_scales(model) == 1
    (scaled,) = [node for node in model.get_ops() if _scales(node)]
    assert scaled.get_output_partial_shape(0).rank.get_length() == 3
    np.testing.assert_allclose(run(model, batch), run(group_norm(silu), batch), atol=1e-6)


def test_a_scaled_tensor_that_something_else_reads_stays_as_it_is() -> None:
    model = group_norm(read_twice=True)
    assert flatten_channel_scales(model) == 0
    np.testing.assert_array_equal(run(model, image(2)), run(group_norm(read_twice=True), image(2)))


def _scales(node: openvino.Node) -> bool:
    if node.get_type_name() != "Multiply":
        return False
    return str(node.input_value(1).get_node().get_type_name()) == "Constant"


MEMORY = """
import random, sys
from pathlib import Path
import numpy as np
from hypergen_gateway.embedded.backends.openvino.compilations import Compilations

def infer(rows):
    batch = {
        "sample": np.zeros((rows, channels, 8, 8), np.float32),
        "time": np.zeros((rows, time_width), np.float32),
        "encoder_hidden_states": np.zeros((rows, tokens, width), np.float32),
    }
    unet.find(batch).infer(batch, ["model_output"])

def anonymous_mebibytes():
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == "Pss_Anon:") / 1024

tokens, (channels, width, time_width) = 77, map(int, sys.argv[2:])
# One thread: when a second one first gets work, and memory of its own, depends on the machine's load.
unet = Compilations(Path(sys.argv[1]), {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"})
infer(2)
for rows in (*range(1, 17), *range(1, 17)):
    infer(rows)
unet._compiler.submit(int).result()  # the queue of compilations is empty
for rows in (*range(1, 17), *range(1, 17)):
    infer(rows)
print(anonymous_mebibytes())
chance = random.Random(0)
for _ in range(1000):
    infer(chance.randint(1, 16))
print(anonymous_mebibytes())
"""


def test_memory_is_flat_once_each_number_of_rows_was_seen(exported: Path) -> None:
    file = exported / "unet" / "1" / "model.onnx"
    shapes = {each.any_name: each.partial_shape for each in openvino.Core().read_model(file).inputs}
    sizes = [shapes["sample"][1], shapes["encoder_hidden_states"][2], shapes["time"][1]]
    command = [sys.executable, "-c", MEMORY, str(file), *(str(size.get_length()) for size in sizes)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    warm, after_a_thousand = map(float, ended.stdout.split())
    assert after_a_thousand - warm < 4, f"{warm:.0f} MiB, then {after_a_thousand:.0f} MiB"
