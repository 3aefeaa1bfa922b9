"""The estimate of GPU memory: weights of published architectures, an engine that TensorRT-RTX builds, the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.cli import estimate
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.engines import profiles
from hypergen_export.engines.engine import Size
from hypergen_export.engines.memory import FIXED_BYTES, Model, Need
from hypergen_export.engines.profiles import Shapes
from hypergen_export.engines.tensorrt import Build, build_plan, rtx_target
from hypergen_export.errors import BadOptionError
from hypergen_export.repository.estimate import host_bytes, read_memory
from support.published import publish
from support.single_transformers import NAMES, save_transformer_file


def model_of(folder: Path, dtype: str = "bfloat16") -> Model:
    checkpoint = open_checkpoint(str(folder))
    return Model(checkpoint=checkpoint, components=checkpoint.family.components, dtype=dtype)


def shapes_of(checkpoint: Checkpoint, *sizes: Size, rows: int = 2) -> Shapes:
    return profiles.shapes_of(checkpoint, sizes or ((64, 64),), rows)


def needs(model: Model, *sizes: Size, rows: int = 2) -> dict[str, Need]:
    return {need.name: need for need in model.needs(shapes_of(model.checkpoint, *sizes, rows=rows))}


def test_a_published_checkpoint_has_its_weights_and_activations(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Z-Image: 6.15 billion parameters. TensorRT-RTX states these activations for layers of its width, two rows."""
    model = model_of(publish("Z-Image", checkpoint_of("z-image"), tmp_path / "z-image"))
    found = needs(model, (1024, 1024))
    assert found["transformer"].weights == pytest.approx(2 * 6.15e9, rel=0.005)
    assert found["transformer"].activations == pytest.approx(1_033_852_416, rel=0.1)
    assert found["vae_decoder"].activations == pytest.approx(1_350_434_304, rel=0.1)
    eight = needs(replace(model, dtype="fp8"), (1024, 1024))
    # Its modulation, embedders and last layer are 2 % of it.
    assert eight["transformer"].weights == pytest.approx(1.02 * 6.15e9, rel=0.01)
    assert replace(eight["transformer"], dtype="bfloat16", weights=found["transformer"].weights) == found["transformer"]
    assert {name: need.dtype for name, need in eight.items()} == {
        **dict.fromkeys(found, "bfloat16"),
        "transformer": "fp8",
    }


@pytest.mark.parametrize(("family", "dtype"), [("sd-1", "int8"), ("flux1-dev", "fp8")])
def test_calibration_needs_the_denoiser_and_the_text_encoders_in_float32(
    family: str, dtype: str, checkpoint_of: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    components = {component.module: component for component in checkpoint.family.components}
    modules = [load_module(checkpoint, components[name]) for name in components if name != "vae"]
    needed = 4 * sum(parameter.numel() for module in modules for parameter in module.parameters())
    model = model_of(checkpoint.folder, dtype)
    assert host_bytes(model, shapes_of(checkpoint)) == pytest.approx(needed, rel=0.01)
    largest = max(need.weights for need in needs(replace(model, dtype="bfloat16")).values())
    assert host_bytes(replace(model, dtype="bfloat16"), shapes_of(checkpoint)) == 3 * largest
    assert f" about {needed / 2**30:.2f} GiB while it is calibrated" in run(checkpoint.folder, "--dtype", dtype).output


def test_layers_that_are_not_used_do_not_count(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """FLUX.2-klein-4B takes 27 of the 36 layers of its text encoder: 3.11 of 4.02 billion parameters."""
    model = model_of(publish("FLUX.2-klein-4B", checkpoint_of("flux2-klein"), tmp_path / "klein"))
    found = needs(model, (1024, 1024))
    assert found["text_encoder"].weights == pytest.approx(2 * 3.11e9, rel=0.005)
    # What TensorRT-RTX states without reference images; their profile has 16,384 tokens beside 4,608.
    assert found["transformer"].activations == pytest.approx(1_130_606_592 * (2 + 16384 / 4608), rel=0.1)


def test_chroma_has_the_weights_that_its_card_states(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """8.9 billion parameters, and the encoder of T5-XXL alone."""
    found = needs(model_of(publish("Chroma1-HD", checkpoint_of("chroma"), tmp_path / "chroma")))
    weights = {name: need.weights for name, need in found.items() if not name.startswith("vae")}
    assert weights == pytest.approx({"transformer": 2 * 8.9e9, "text_encoder": 2 * 4.76e9}, rel=0.005)


def test_sana_has_the_weights_that_its_name_states(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """1.6 billion parameters, and Gemma-2-2B without its head. TensorRT-RTX states these activations for two rows."""
    model = model_of(publish("Sana 1.5 1.6B", checkpoint_of("sana-1.5"), tmp_path / "sana"))
    found = needs(model, (1024, 1024))
    assert found["transformer"].weights == pytest.approx(2 * 1.6e9, rel=0.01)
    assert found["text_encoder"].weights == pytest.approx(2 * 2.61e9, rel=0.005)
    assert found["transformer"].activations == pytest.approx(248_824_320, rel=0.1)


def test_the_two_halves_of_a_vae_are_all_of_it(checkpoint_folder: Path) -> None:
    model = model_of(checkpoint_folder)
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint_folder / "vae")
    found = needs(model)
    assert found["vae_decoder"].weights + found["vae_encoder"].weights == 2 * sum(p.numel() for p in vae.parameters())


@pytest.mark.parametrize("family", ["sd-1", "stable-diffusion-3", "z-image"])
def test_a_rank_pool_counts_with_its_branches(
    family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = model_of(checkpoint_of(family))
    pool = LoraPool.of_columns(20, kernels=True)
    pooled = replace(model, components=tuple(each.with_pool(pool) for each in model.components))
    plain, found = needs(model), needs(pooled)
    for component in pooled.components:
        expected = 0
        if component.pool:
            weights = PoolWeights(tmp_path)
            module = load_module(model.checkpoint, component)
            weights.create(component.module, module, component.pool, torch.bfloat16)
            expected = 2 * sum(tensor.numel() for tensor in weights.empty().values())
        assert found[component.name].weights - plain[component.name].weights == expected, component.name


def test_parts_that_overflow_in_float16_have_twice_its_bytes(checkpoint_of: Callable[[str], Path]) -> None:
    model = model_of(checkpoint_of("flux1-dev"))
    half, bfloat = needs(model_of(model.checkpoint.folder, "float16")), needs(model)
    assert {name: half[name].weights // bfloat[name].weights for name in bfloat} == {
        "text_encoder": 1,
        "text_encoder_2": 2,
        "transformer": 1,
        "vae_decoder": 1,
        "vae_encoder": 1,
    }


def test_each_size_and_row_adds_activations_and_no_weights(checkpoint_of: Callable[[str], Path]) -> None:
    model = model_of(checkpoint_of("z-image"))
    one, two, rows = (
        needs(model, *sizes, rows=count)["transformer"]
        for sizes, count in ((((64, 64),), 2), (((64, 64), (64, 64)), 2), (((64, 64),), 6))
    )
    assert one.weights == two.weights == rows.weights
    assert two.activations == pytest.approx(2 * one.activations, abs=1)
    assert rows.activations == pytest.approx(3 * one.activations, abs=2)


def test_a_vaes_engine_needs_what_is_estimated(family_of: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """By TensorRT-RTX's own words while it builds."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    folder, repository = family_of("sd-1")
    model, size = model_of(folder, "float32"), (512, 512)
    (decoder,) = (component for component in model.components if component.name == "vae_decoder")
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        first_error = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, _: Any, message: str) -> None:
            said.append(message)

    build = Build(
        name=decoder.name,
        onnx=repository / decoder.name / "1" / "model.onnx",
        dtype="float32",
        plan=tmp_path / "model.plan",
        profiles=profiles.profiles(decoder, shapes_of(model.checkpoint, size)),
        target=rtx_target("8.6"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypergen_export.engines.tensorrt._make_log", lambda _: Log())
        build_plan(build, lambda _: None)
    (stated,) = (line for line in said if line.startswith("Total Activation Memory"))
    assert needs(model, size)["vae_decoder"].activations == pytest.approx(int(stated.split()[3]), rel=0.25)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(estimate, [str(argument) for argument in arguments])


def test_the_command_answers_with_a_table_and_its_exit_code(checkpoint_of: Callable[[str], Path]) -> None:
    folder = checkpoint_of("flux1-dev")
    fits = run(folder, "--gpu", "24GB", "--sizes", "64x64")
    assert fits.exit_code == 0, fits.output
    assert "text_encoder_2            bfloat16" in fits.output
    assert "GiB while Triton loads the largest engine" in fits.output
    assert fits.output.endswith("It fits into 24.00 GiB; the largest --max-batch-size that fits is 128.\n")
    assert run(folder).exit_code == 0

    total = model_of(folder).total(shapes_of(open_checkpoint(str(folder)), (1024, 1024), rows=4))
    smaller = run(folder, "--gpu", f"{total / 2**20 + 1:.3f}MiB", "--sizes", "1024x1024", "--max-batch-size", "64")
    assert smaller.exit_code == 1
    assert "but --max-batch-size 2 does." in smaller.output

    never = run(folder, "--gpu", f"{FIXED_BYTES // 2**20}MiB", "--sizes", "64x64")
    assert never.exit_code == 1
    assert "in any size: the weights alone need" in never.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "lots"], "--gpu: must be an amount such as 24GB, not 'lots'"),
        (["--gpu", "0GB"], "--gpu: must be an amount"),
        (["--sizes", "63x64"], "--sizes: 63x64 does not suit this model"),
        (["--dtype", "int8", "--lora-rank", "16"], "--lora-rank, --lora-dir: not with --dtype int8"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(checkpoint_folder: Path, arguments: list[str], says: str) -> None:
    refused = run(checkpoint_folder, *arguments)
    assert refused.exit_code == 2
    assert f"hypergen: {says}" in refused.output
    assert "Traceback" not in refused.output


def test_a_single_file_needs_what_its_folder_needs(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    file = save_transformer_file(tmp_path / "flux.safetensors", folder, NAMES["flux1-dev"], "")
    parts = ("--text-encoder", folder, "--cache-dir", tmp_path / "cache")
    given, expected = (run(*arguments, "--sizes", "64x64") for arguments in ((file, *parts), (folder,)))
    assert (given.exit_code, given.stdout) == (0, expected.stdout)


def test_units_of_memory() -> None:
    assert read_memory("24GB") == read_memory("24 gib") == read_memory("24") == 24 * 2**30
    assert read_memory("81559MiB") == 81559 * 2**20
    for wrong in ("-1GB", "24TB", "", "1e3GB", "٣GB"):
        with pytest.raises(BadOptionError):
            read_memory(wrong)
