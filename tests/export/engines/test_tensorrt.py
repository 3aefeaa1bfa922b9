"""Plans of the miniatures, built by TensorRT-RTX on the CPU, held against the configuration that Triton gets.

Of 1.x a whole repository is exported in float16, with a LoRA in a rank pool. Of the other families every component
whose graph is its own is built from the ONNX that the tests of OpenVINO use, for one size and mostly in float32; these
come with what DeepCache needs.

Without a GPU no engine can be loaded again: what is compared is the network and the profiles that the builder was given
and accepted, as the record beside each plan states them.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as pb

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.engines.engine import read_sizes
from hypergen_export.engines.profiles import Bounds, shapes_of
from hypergen_export.engines.tensorrt import (
    Build,
    Phases,
    Target,
    build_plan,
    local_target,
    rtx_target,
    write_plan_record,
)
from hypergen_export.errors import BadOptionError, ConversionError, MissingDependencyError, NoGpuError
from hypergen_export.repository.config_pbtxt import EngineOptions, component_config
from hypergen_export.repository.export import ExportResult, export
from hypergen_export.repository.layout import sampler_folder, sampler_sources
from hypergen_export.repository.request import ExportRequest
from support.loras import RANK, lora_weights, save_by_diffusers, save_with_magnitudes
from support.miniature import FAMILIES

from ..conftest import (
    COMPONENTS,
    CONVERTED,
    CONVERTED_DTYPES,
    EXPORTED,
    WEIGHTS,
    Converted,
    ForEngines,
    component_of,
)
from .conftest import CAPABILITY, make_build

pytest.importorskip("tensorrt_rtx")

NAMES = tuple(COMPONENTS)
SIZES = read_sizes("64x64,96x64")
ROWS = 4
# Of the rank pool.
COLUMNS = 8
HALF_PRECISION = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Beside the whole repository of 1.x in float16. The UNet is the one that is told everything that any is told; of CLIP
# and of VAEs those that other tests convert, too.
IN_HALF_PRECISION = [
    ("stable-diffusion-3", "text_encoder_2", "bfloat16"),
    ("flux2-klein", "vae_decoder", "bfloat16"),
    ("lcm-sdxl", "unet", "float16"),
]
EVERY_ENGINE = [(family, name) for family, names in {"sd-1": NAMES, **EXPORTED, **CONVERTED}.items() for name in names]


@pytest.fixture(scope="module")
def request_made(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
    folder = tmp_path_factory.mktemp("plans")
    ink = save_by_diffusers(folder / "ink", lora_weights(checkpoint_folder, "unet", "text_encoder"))
    return ExportRequest(
        model=str(checkpoint_folder),
        output=folder / "repository",
        engine="tensorrt",
        dtype="float16",
        max_batch_size=ROWS // 2,
        sizes=SIZES,
        model_id="tiny/one",
        loras=read_loras([f"ink={ink}"]),
        lora_rank=COLUMNS,
    )


@pytest.fixture(scope="module")
def plans(request_made: ExportRequest, target: Target) -> Path:
    """The miniature as a repository of plans in float16, with a LoRA in a rank pool. Read only."""
    result = export(request_made, target)
    assert (sorted(result.converted), result.reused) == (sorted(NAMES), ())
    return request_made.output


@dataclass(frozen=True)
class Engine:
    """A component's plan as its record states it, and the configuration that Triton gets with it."""

    plan: Path
    record: Mapping[str, Any]
    config: Any


@dataclass(frozen=True)
class Source:
    """What an engine is built of: a component's file, with weights of `dtype`."""

    checkpoint: Checkpoint
    component: Component
    onnx: Path
    dtype: str


@pytest.fixture(scope="module")
def source_of(
    family_of: Callable[[str], tuple[Path, Path]],
    converted: Callable[[str], Converted],
    for_engines: Callable[[str, str, str], ForEngines],
) -> Callable[[str, str, str], Source]:
    """Family, component and precision -> its file."""

    @functools.cache
    def find(family: str, name: str, dtype: str) -> Source:
        if family in CONVERTED:
            found = converted(family)
            assert found.dtype == dtype
            return Source(found.checkpoint, component_of(found.checkpoint, name), found.onnx[name], dtype)
        if dtype == "float32":
            folder, repository = family_of(family)
            opened = open_checkpoint(str(folder))
            return Source(opened, component_of(opened, name), repository / name / "1" / "model.onnx", dtype)
        written = for_engines(family, name, dtype)
        return Source(written.checkpoint, written.component, written.onnx, dtype)

    return find


@pytest.fixture(scope="module")
def engine_of(
    request: pytest.FixtureRequest,
    target: Target,
    source_of: Callable[[str, str, str], Source],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Engine]:
    """Family and component -> its engine, built once."""

    @functools.cache
    def make(family: str, name: str) -> Engine:
        if family == "sd-1":
            return read_engine(request.getfixturevalue("plans") / name)
        folder = tmp_path_factory.mktemp("engine") / name
        build_engine(source_of(family, name, CONVERTED_DTYPES.get(family, "float32")), target, folder)
        return read_engine(folder)

    return make


def build_engine(source: Source, target: Target, folder: Path) -> None:
    """Write the plan, its record and its configuration into `folder`, which has the component's name."""
    shapes = shapes_of(source.checkpoint, SIZES[1:], ROWS)
    plan = folder / "1" / "model.plan"
    plan.parent.mkdir(parents=True)
    build = make_build(source.component, source.onnx, plan, shapes, target, dtype=source.dtype)
    began = time.monotonic()
    write_plan_record(build, build_plan(build, lambda _: None))
    print(f"{source.checkpoint.family.name} {folder.name}: built in {time.monotonic() - began:.1f} s")
    options = EngineOptions(engine="tensorrt", dtype=source.dtype, shapes=shapes, default_size=(64, 64))
    (folder / "config.pbtxt").write_text(component_config(source.component, options))


def read_engine(folder: Path) -> Engine:
    plan = folder / "1" / "model.plan"
    return Engine(plan, record_of(folder.parent, folder.name), config_of(folder.parent, folder.name))


def record_of(plans: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((plans / name / "1" / "model.plan.json").read_text())
    return record


def config_of(plans: Path, name: str) -> Any:
    return text_format.Parse((plans / name / "config.pbtxt").read_text(), pb.ModelConfig())


def graph_of(family: str, name: str) -> tuple[Any, ...]:
    """What tells a component's graph from that of the same component in other families, but the values of constants."""
    kind = FAMILIES[family]
    own = {
        "text_encoder": (kind.hidden_act, kind.second_text_encoder),
        "unet": tuple(sorted(kind.unet.items())),
        "unet_shallow": kind.unet.get("up_block_types", ("CrossAttnUpBlock2D",))[-1:],
        "vae_encoder": (kind.pipeline.endswith("InpaintPipeline"),),
    }
    return (name, *own.get(name, ()))


def bindings(entries: Any) -> dict[str, dict[str, Any]]:
    """What Triton will ask of the engine: the batch first, and the reshaped dims where there are such."""
    return {
        entry.name: {
            "dtype": pb.DataType.Name(entry.data_type).removeprefix("TYPE_"),
            "shape": [-1, *(entry.reshape.shape if entry.HasField("reshape") else entry.dims)],
        }
        for entry in entries
    }


def admits(bounds: dict[str, list[int]], shape: list[int]) -> bool:
    limits = zip(bounds["smallest"], shape, bounds["largest"], strict=True)
    return all(low <= side <= high for low, side, high in limits)


def test_a_repository_of_plans_has_no_onnx_and_a_record_beside_each_plan(plans: Path) -> None:
    files = {path.relative_to(plans).as_posix() for path in plans.rglob("*") if path.is_file()}
    assert files == {
        "hypergen.json",
        *(f"{name}/config.pbtxt" for name in (*NAMES, "diffusion")),
        *(f"{name}/1/model.plan" for name in NAMES),
        *(f"{name}/1/model.plan.json" for name in NAMES),
        *(f"{name}/1/lora_pool.json" for name in ("text_encoder", "unet")),
        *(f"diffusion/{source.relative_to(sampler_folder()).as_posix()}" for source in sampler_sources()),
        "diffusion/tokenizer.json",
        "diffusion/schedulers.json",
    }


@pytest.mark.claim("engines")
def test_every_graph_of_every_family_is_among_those_built() -> None:
    built = {graph_of(family, name) for family, name in EVERY_ENGINE}
    for family, kind in FAMILIES.items():
        names = EXPORTED["sdxl"] if kind.second_text_encoder else NAMES
        assert {graph_of(family, name) for name in names} <= built, family


@pytest.mark.claim("engines", "bindings")
@pytest.mark.parametrize(("family", "name"), EVERY_ENGINE)
def test_the_configuration_names_exactly_the_engines_bindings(
    family: str, name: str, engine_of: Callable[[str, str], Engine]
) -> None:
    engine = engine_of(family, name)
    config, record = engine.config, engine.record
    assert bindings(config.input) == record["inputs"]
    assert bindings(config.output) == record["outputs"]
    plan = engine.plan.read_bytes()
    assert all(tensor.encode() in plan for tensor in (*record["inputs"], *record["outputs"]))


@pytest.mark.claim("bindings")
@pytest.mark.parametrize(("family", "name"), EVERY_ENGINE)
def test_triton_runs_a_component_on_the_gpu_with_all_profiles(
    family: str, name: str, engine_of: Callable[[str, str], Engine]
) -> None:
    config, record = engine_of(family, name).config, engine_of(family, name).record
    assert (config.name, config.backend, config.default_model_filename) == (name, "tensorrt", "model.plan")
    (group,) = config.instance_group
    assert group.kind == pb.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == [str(index) for index in range(len(record["profiles"]))]
    assert config.HasField("dynamic_batching")
    assert dict(config.parameters)["execution_context_allocation_strategy"].string_value == "ON_PROFILE_CHANGE"


@pytest.mark.claim("bindings")
@pytest.mark.parametrize(("family", "name"), EVERY_ENGINE)
def test_every_profile_takes_the_configurations_batches_and_no_larger_one(
    family: str, name: str, engine_of: Callable[[str, str], Engine]
) -> None:
    config, record = engine_of(family, name).config, engine_of(family, name).record
    for profile in record["profiles"]:
        assert profile.keys() == record["inputs"].keys()
        for tensor, bounds in profile.items():
            assert (bounds["smallest"][0], bounds["largest"][0]) == (1, config.max_batch_size)
            assert bounds["smallest"][1:] == bounds["usual"][1:]
            # Chunks of prompts, whose number is free.
            chunks = 16 if tensor == "encoder_hidden_states" else 1
            tokens, *others = bounds["usual"][1:]
            assert bounds["largest"][1:] == [chunks * tokens, *others]
            assert bounds["smallest"][0] <= bounds["usual"][0] <= bounds["largest"][0]


def test_a_merged_lora_has_plans_of_its_own(
    plans: Path, request_made: ExportRequest, target: Target, checkpoint_folder: Path, tmp_path: Path
) -> None:
    file = save_with_magnitudes(tmp_path / "words.safetensors", checkpoint_folder, "text_encoder")
    words = read_loras([f"words={file}:0.5"])
    request = replace(request_made, output=plans.with_name("with-lora"), loras=(*request_made.loras, *words))
    name = "text_encoder.words@0.5"
    assert export(request, target) == ExportResult(converted=(name,), reused=NAMES)
    theirs, ours = record_of(plans, "text_encoder"), record_of(request.output, name)
    assert ours.pop("onnx_sha256") != theirs.pop("onnx_sha256")
    assert ours == theirs
    assert config_of(request.output, name).name == name


def test_the_sizes_asked_for_are_the_profiles_and_the_samplers(plans: Path) -> None:
    sides = {
        name: [profile[tensor]["usual"] for profile in record_of(plans, name)["profiles"]]
        for name, tensor in (("unet", "sample"), ("vae_decoder", "latents"), ("vae_encoder", "image"))
    }
    assert sides == {
        "unet": [[2, 4, 8, 8], [2, 4, 8, 12]],
        "vae_decoder": [[1, 4, 8, 8], [1, 4, 8, 12]],
        "vae_encoder": [[1, 64, 64, 3], [1, 64, 96, 3]],
    }
    assert len(record_of(plans, "text_encoder")["profiles"]) == 1
    parameters = {key: value.string_value for key, value in config_of(plans, "diffusion").parameters.items()}
    assert parameters["sizes"] == "64x64,96x64"
    assert (parameters["min_size"], parameters["max_size"]) == ("64", "96")
    assert (parameters["engine"], parameters["device"], parameters["dtype"]) == ("tensorrt", "cuda", "float16")
    assert int(parameters["max_batch_size"]) == config_of(plans, "unet").max_batch_size == ROWS


@pytest.mark.claim("graphs")
@pytest.mark.parametrize(("family", "name"), EVERY_ENGINE)
def test_a_graph_has_every_input_in_a_shape_that_just_one_profile_takes(
    family: str, name: str, engine_of: Callable[[str, str], Engine]
) -> None:
    config, record = engine_of(family, name).config, engine_of(family, name).record
    specs = config.optimization.cuda.graph_spec
    assert config.optimization.cuda.graphs == bool(specs)
    assert bool(specs) == (not name.startswith("vae"))
    for spec in specs:
        assert spec.input.keys() == record["inputs"].keys()
        shapes = {tensor: [spec.batch_size, *spec.input[tensor].dim] for tensor in spec.input}
        fitting = [p for p in record["profiles"] if all(admits(p[tensor], shapes[tensor]) for tensor in shapes)]
        assert len(fitting) == 1, shapes


@pytest.mark.claim("plans")
@pytest.mark.parametrize("name", NAMES)
def test_the_record_says_what_built_the_plan_of_what_and_for_what(plans: Path, name: str) -> None:
    record = record_of(plans, name)
    assert record["library"] == "tensorrt_rtx"
    assert record["version"].split(".")[0].isdecimal()
    assert (record["gpu"], record["compute_capability"], record["dtype"]) == ("", CAPABILITY, "float16")
    assert len(record["onnx_sha256"]) == 64


def test_records_of_different_weights_differ(plans: Path) -> None:
    assert len({record_of(plans, name)["onnx_sha256"] for name in NAMES}) == len(NAMES)


def test_the_repositorys_record_states_target_and_parity(plans: Path, target: Target) -> None:
    record = json.loads((plans / "hypergen.json").read_text())
    assert record["target"] == {
        "library": "tensorrt_rtx",
        "version": target.version,
        "gpu": "",
        "compute_capability": CAPABILITY,
    }
    parity = [entry["parity"] for entry in record["components"].values()]
    assert all(0 <= entry["difference"] <= entry["tolerance"] for entry in parity)


def test_the_same_export_again_does_nothing_and_another_name_builds_nothing(
    plans: Path, request_made: ExportRequest, target: Target, tmp_path: Path
) -> None:
    assert export(request_made, target) == ExportResult()
    copy = tmp_path / "copy"
    _copy(plans, copy)
    assert export(replace(request_made, output=copy, model_id="tiny/two"), target) == ExportResult(reused=NAMES)
    assert record_of(copy, "unet") == record_of(plans, "unet")


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).hardlink_to(file)


@pytest.mark.claim("engines")
def test_what_openvino_runs_is_built_in_float32_too(
    source_of: Callable[[str, str, str], Source], target: Target, tmp_path: Path
) -> None:
    """For two sizes; the other components are those of LCM, which are built for one."""
    source = source_of("sd-1", "unet", "float32")
    shapes = shapes_of(source.checkpoint, SIZES, ROWS)
    build = make_build(source.component, source.onnx, tmp_path / "model.plan", shapes, target)
    shares: list[float] = []
    interface = build_plan(build, shares.append)
    assert build.plan.stat().st_size > source.onnx.stat().st_size / 2
    assert interface.inputs.keys() == {tensor.name for tensor in source.component.inputs}
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5 < shares[-1] <= 1


@pytest.mark.claim("precision")
@pytest.mark.parametrize(("family", "name", "dtype"), IN_HALF_PRECISION)
def test_half_precision_is_inside_the_graph_and_not_in_its_interface(
    family: str,
    name: str,
    dtype: str,
    source_of: Callable[[str, str, str], Source],
    engine_of: Callable[[str, str], Engine],
    target: Target,
    tmp_path: Path,
) -> None:
    source = source_of(family, name, dtype)
    graph = onnx.load(source.onnx).graph
    # Larger than the mean and variance of FLUX.2's 128 channels, which the latents are multiplied by before.
    weights = [tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 128]
    weights = [kind for kind in weights if kind != TensorProto.BOOL]  # the text encoder's causal mask
    assert weights
    assert set(weights) == {HALF_PRECISION[dtype]}
    interface = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert set(interface) <= {TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT8}
    if family in CONVERTED:
        assert engine_of(family, name).record["dtype"] == dtype
        return
    shapes = shapes_of(source.checkpoint, SIZES[:1], ROWS)
    build = make_build(source.component, source.onnx, tmp_path / "model.plan", shapes, target, dtype=dtype)
    build_plan(build, lambda _: None)
    assert build.plan.stat().st_size > 1000


@pytest.mark.claim("engines")
@pytest.mark.parametrize(
    ("name", "dtype"), [("text_encoder", "float32"), ("vae_decoder", "float16"), ("text_encoder", "bfloat16")]
)
def test_weights_that_are_linked_in_another_precision_are_built(
    name: str, dtype: str, for_engines: Callable[[str, str, str], ForEngines], target: Target, tmp_path: Path
) -> None:
    found = for_engines("wide", name, dtype)
    component, weights = found.component, WEIGHTS[found.component.module]
    assert found.onnx.with_name(weights).samefile(found.checkpoint.folder / component.module / weights)
    shapes = shapes_of(found.checkpoint, SIZES[:1], ROWS)
    build = make_build(component, found.onnx, tmp_path / "model.plan", shapes, target, dtype=dtype)
    build_plan(build, lambda _: None)
    assert build.plan.stat().st_size > 1000


@pytest.mark.claim("engines")
@pytest.mark.parametrize("name", ["text_encoder", "unet"])
def test_a_rank_pool_is_built_with_its_loras(name: str, plans: Path) -> None:
    """Of 1.x; a transformer with one is built in test_transformers.py."""
    record = record_of(plans, name)
    assert record["inputs"]["lora_scales"] == {"dtype": "FP32", "shape": [-1, COLUMNS]}
    assert all(profile["lora_scales"]["usual"][1:] == [COLUMNS] for profile in record["profiles"])
    (lora,) = json.loads(config_of(plans, "diffusion").parameters["loras"].string_value)
    assert (lora["name"], len(lora["columns"])) == ("ink", RANK)


@pytest.mark.claim("precision")
def test_bfloat16_is_resized_in_float32(source_of: Callable[[str, str, str], Source]) -> None:
    graph = onnx.load(source_of("flux2-klein", "vae_decoder", "bfloat16").onnx).graph
    makers = {output: node for node in graph.node for output in node.output}
    users = {name: node for node in graph.node for name in node.input}
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    assert len(resizes) == 3
    for node in resizes:
        for cast, to in ((makers[node.input[0]], TensorProto.FLOAT), (users[node.output[0]], TensorProto.BFLOAT16)):
            assert cast.op_type == "Cast"
            assert [attribute.i for attribute in cast.attribute] == [to]


def one_node_build(tmp_path: Path, target: Target, operator: str, element: int, **attributes: Any) -> Build:
    """A build of a graph that is one operator from x to y."""
    x, y = (helper.make_tensor_value_info(name, element, ["batch", 4]) for name in "xy")
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", **attributes)
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    onnx.save(model, tmp_path / "model.onnx")
    bounds = Bounds(smallest=(1, 4), usual=(1, 4), largest=(2, 4))
    return Build(
        name="unet",
        onnx=tmp_path / "model.onnx",
        dtype="float32",
        plan=tmp_path / "model.plan",
        profiles=[{"x": bounds}],
        target=target,
    )


def test_an_operator_that_tensorrt_refuses_is_one_line_with_its_name(tmp_path: Path, target: Target) -> None:
    build = one_node_build(tmp_path, target, "Transpose", TensorProto.UINT8, perm=[1, 0])
    with pytest.raises(ConversionError, match=r"^unet: TensorRT cannot read the ONNX \(Transpose the_node: ") as error:
        build_plan(build, lambda _: None)
    assert "UInt8" in str(error.value)
    assert "\n" not in str(error.value)
    assert not build.plan.exists()


def test_a_file_that_is_no_onnx_is_one_line(tmp_path: Path, target: Target) -> None:
    build = one_node_build(tmp_path, target, "Relu", TensorProto.FLOAT)
    build.onnx.write_bytes(b"no model")
    with pytest.raises(ConversionError, match=r"^unet: TensorRT cannot read the ONNX \(.+\)$"):
        build_plan(build, lambda _: None)


def test_profiles_that_the_network_does_not_take_are_one_line(tmp_path: Path, target: Target) -> None:
    build = one_node_build(tmp_path, target, "Relu", TensorProto.FLOAT)
    wrong = Bounds(smallest=(1, 5), usual=(1, 5), largest=(2, 5))
    with pytest.raises(ConversionError, match=r"^unet: TensorRT cannot build the engine \(.+\)$"):
        build_plan(replace(build, profiles=[{"x": wrong}]), lambda _: None)


def test_an_interrupt_ends_the_build_and_leaves_no_plan(tmp_path: Path, target: Target) -> None:
    build = one_node_build(tmp_path, target, "Relu", TensorProto.FLOAT)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(build, interrupt)
    assert not build.plan.exists()


def test_a_gpu_that_the_library_builds_nothing_for_is_refused() -> None:
    with pytest.raises(BadOptionError, match=r"compute capability 9\.9"):
        rtx_target("9.9")


def test_a_gpu_before_ampere_computes_in_no_bfloat16(checkpoint_folder: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        model=str(checkpoint_folder), output=tmp_path / "repository", engine="tensorrt", dtype="bfloat16"
    )
    with pytest.raises(BadOptionError, match=r"--dtype bfloat16: .* has 7\.5; use float16"):
        export(request, rtx_target("7.5"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_for_this_machine_needs_tensorrt_and_a_gpu(checkpoint_folder: Path, tmp_path: Path) -> None:
    try:
        local_target()
    except (MissingDependencyError, NoGpuError):
        with pytest.raises((MissingDependencyError, NoGpuError)):
            export(ExportRequest(model=str(checkpoint_folder), output=tmp_path / "repository", engine="tensorrt"))
        assert list(tmp_path.iterdir()) == []
    else:
        pytest.skip("this machine has both")


@pytest.mark.claim("precision")
def test_a_component_that_overflows_float16_stays_in_float32() -> None:
    decoder = replace(COMPONENTS["vae_decoder"], overflows_float16=True)
    assert decoder.weights_dtype("float16") == "float32"
    assert decoder.weights_dtype("bfloat16") == "bfloat16"
    assert COMPONENTS["vae_decoder"].weights_dtype("float16") == "float16"


def test_progress_counts_steps_inside_steps_and_never_falls_back() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    phases.complete("build", 0)
    assert phases.fraction == 0.25
    phases.start("time", "build", 2)
    phases.complete("time", 0)
    assert phases.fraction == pytest.approx(0.25 + 0.125)
    phases.finish("time")
    phases.start("time", "build", 10)
    phases.complete("time", 0)
    assert phases.fraction == pytest.approx(0.25 + 0.125)
    phases.finish("time")
    phases.complete("build", 3)
    assert phases.fraction == 1.0
    phases.complete("nobody announced this", 5)
    assert phases.fraction == 1.0
