"""What an export does again and what it takes over from the one before."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTextModel

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.checkpoints.embeddings import read_embeddings
from hypergen_export.checkpoints.families.unet import STABLE_DIFFUSION
from hypergen_export.checkpoints.hashes import LARGE
from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.checkpoints.weights import sha256
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.pooling import PoolWeights
from hypergen_export.errors import BadLoraError, BrokenCheckpointError, OutputRefusedError, PassportRefusedError
from hypergen_export.repository import task as tasks
from hypergen_export.repository.config_pbtxt import read_config
from hypergen_export.repository.export import ExportResult, export
from hypergen_export.repository.layout import sampler_folder, sampler_sources
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.staging import PreviousExport
from hypergen_export.repository.task import ExportTask
from support.loras import save_with_magnitudes

from ..conftest import WEIGHTS, Array, edit_json, leftovers

NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture
def request_again(checkpoint_folder: Path, repository_copy: Path) -> ExportRequest:
    """The very request that made the repository."""
    return ExportRequest(model=str(checkpoint_folder), output=repository_copy, max_batch_size=4, model_id="tiny/one")


def onnx_files(repository: Path) -> dict[str, int]:
    """Component -> identity of its file."""
    return {name: (repository / name / "1" / "model.onnx").stat().st_ino for name in NAMES}


def sampler_parameter(repository: Path, name: str) -> str:
    config = read_config((repository / "diffusion" / "config.pbtxt").read_text())
    return str(config.parameters[name].string_value)


def test_a_repository_is_laid_out_as_triton_and_the_sampler_expect(repository: Path) -> None:
    files = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert files == {
        "hypergen.json",
        *(f"{name}/config.pbtxt" for name in (*NAMES, "diffusion")),
        *(f"{name}/1/model.onnx" for name in NAMES),
        *(f"diffusion/{source.relative_to(sampler_folder()).as_posix()}" for source in sampler_sources()),
        "diffusion/tokenizer.json",
        "diffusion/schedulers.json",
    }


def test_the_record_says_what_was_made_of_what_and_how_well(repository: Path, checkpoint_folder: Path) -> None:
    record = json.loads((repository / "hypergen.json").read_text())
    assert record["model"] == str(checkpoint_folder)
    assert (record["engine"], record["dtype"], record["model_id"]) == ("openvino", "float32", "tiny/one")
    assert record["versions"].keys() >= {"torch", "diffusers", "openvino"}
    parity = {name: entry["parity"] for name, entry in record["components"].items()}
    assert tuple(parity) == NAMES
    assert all(0 <= entry["difference"] <= entry["tolerance"] for entry in parity.values())


def test_the_record_says_what_is_to_be_exported_for_a_comparison(
    request_again: ExportRequest, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint_folder.parent)
    relative = replace(request_again, model=checkpoint_folder.name, dtype="bfloat16")
    export(relative)
    source = json.loads((request_again.output / "hypergen.json").read_text())["source"]
    assert source == {
        "model": str(checkpoint_folder),
        "vae": None,
        "text_encoders": [],
        "prediction_type": None,
        "embeddings": [],
    }


def test_an_export_that_does_not_pass_its_examination_leaves_the_one_before(request_again: ExportRequest) -> None:
    before = (request_again.output / "hypergen.json").read_bytes()
    seen = []

    def examine(folder: Path) -> None:
        seen.append(json.loads((folder / "hypergen.json").read_text())["dtype"])
        raise PassportRefusedError("too far")

    with pytest.raises(PassportRefusedError):
        export(replace(request_again, dtype="bfloat16"), examine=examine)
    assert seen == ["bfloat16"]
    assert (request_again.output / "hypergen.json").read_bytes() == before
    assert leftovers(request_again.output.parent) == [request_again.output.name]


def test_the_same_export_again_does_nothing(request_again: ExportRequest) -> None:
    before = {path: path.stat().st_mtime_ns for path in request_again.output.rglob("*")}
    assert export(request_again) == ExportResult()
    assert {path: path.stat().st_mtime_ns for path in request_again.output.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "parameter", "value"),
    [
        ({"dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"max_batch_size": 2}, "max_batch_size", "4"),
        ({"model_id": "another/id"}, "model_id", "another/id"),
    ],
)
def test_changing_a_setting_reuses_every_component(
    request_again: ExportRequest, changes: dict[str, object], parameter: str, value: str
) -> None:
    before = onnx_files(request_again.output)
    result = export(replace(request_again, **changes))  # type: ignore[arg-type]
    assert result == ExportResult(reused=NAMES)
    assert onnx_files(request_again.output) == before
    assert sampler_parameter(request_again.output, parameter) == value
    assert export(replace(request_again, **changes)) == ExportResult()  # type: ignore[arg-type]


def test_the_engines_precision_reaches_every_component(request_again: ExportRequest) -> None:
    export(replace(request_again, dtype="bfloat16"))
    configs = [read_config((request_again.output / name / "config.pbtxt").read_text()) for name in NAMES]
    assert {config.parameters["HINT_BF16"].string_value for config in configs} == {"YES"}


def test_changing_the_scheduler_reuses_every_component(checkpoint_copy: Path, request_again: ExportRequest) -> None:
    edit_json(checkpoint_copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    result = export(replace(request_again, model=str(checkpoint_copy)))
    assert result == ExportResult(reused=NAMES)
    assert sampler_parameter(request_again.output, "default_scheduler") == "ddim"


def test_changed_weights_convert_only_their_component(checkpoint_copy: Path, request_again: ExportRequest) -> None:
    path = checkpoint_copy / "text_encoder" / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    before = onnx_files(request_again.output)
    result = export(replace(request_again, model=str(checkpoint_copy)))
    assert result == ExportResult(converted=("text_encoder",), reused=NAMES[1:])
    after = onnx_files(request_again.output)
    assert {name for name in NAMES if before[name] != after[name]} == {"text_encoder"}


def test_a_checkpoint_is_never_served_with_the_weights_of_another_of_the_same_sizes_and_times(
    checkpoint_folder: Path, request_again: ExportRequest, tmp_path: Path
) -> None:
    """As they come out of Nix, a buildpack or an archive: two fine-tunes, exported into one cache."""
    first, second = (Path(shutil.copytree(checkpoint_folder, tmp_path / name)) for name in ("first", "second"))
    path = second / "text_encoder" / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for file in (*first.rglob("*"), *second.rglob("*")):
        os.utime(file, (1, 1))
    assert export(replace(request_again, model=str(first))) == ExportResult()
    before = hidden_states(request_again.output / "text_encoder" / "1" / "model.onnx")
    other = replace(request_again, model=str(second), output=tmp_path / "other")
    shutil.copytree(request_again.output, tmp_path / "beside")
    assert export(other) == ExportResult(converted=("text_encoder",), reused=NAMES[1:])
    after = hidden_states(other.output / "text_encoder" / "1" / "model.onnx")
    assert np.abs(after - before).max() > 0.01


def test_large_weights_are_read_once_and_known_to_every_export_beside(
    checkpoint_copy: Path, request_again: ExportRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_copy / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "padding": torch.zeros(LARGE // 4)}, path, {"format": "pt"})
    while time.time_ns() - path.stat().st_ctime_ns < 3 * 10**9:  # what was written just now may still be written to
        time.sleep(0.1)
    request = replace(request_again, model=str(checkpoint_copy))
    assert export(request).converted == ("text_encoder",)
    assert "weights: hash" in capsys.readouterr().err
    assert len(json.loads((request.output / "hypergen.json").read_text())["hashes"]) == 1
    assert export(request) == ExportResult()
    assert export(replace(request, output=request.output.with_name("beside"))) == ExportResult(reused=NAMES)
    assert "weights: hash" not in capsys.readouterr().err
    path.rename(path.with_suffix(".moved"))
    shutil.copy2(path.with_suffix(".moved"), path)
    assert export(request) == ExportResult(), "the same content, though nobody can know without reading it"
    assert "weights: hash" in capsys.readouterr().err


def test_a_checkpoint_that_has_moved_is_found_by_what_reads_the_record(
    checkpoint_copy: Path, request_again: ExportRequest
) -> None:
    request = replace(request_again, model=str(checkpoint_copy))
    assert export(request) == ExportResult()
    record = json.loads((request.output / "hypergen.json").read_text())
    assert (record["model"], record["source"]["model"]) == (str(checkpoint_copy), str(checkpoint_copy))
    assert export(request) == ExportResult()


def test_hashes_computed_by_an_up_to_date_export_are_stored_in_it(
    checkpoint_copy: Path, request_again: ExportRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint_copy / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "padding": torch.zeros(LARGE // 4)}, path, {"format": "pt"})
    request = replace(request_again, model=str(checkpoint_copy))
    assert export(request).converted == ("text_encoder",)
    path.touch()
    while time.time_ns() - path.stat().st_ctime_ns < 3 * 10**9:
        time.sleep(0.1)
    for _ in range(2):
        assert export(request) == ExportResult()
    assert capsys.readouterr().err.count("weights: hash") == 2, "for the export, and for the first time it is seen old"
    assert sorted(path.name for path in request.output.iterdir() if path.name.startswith(".")) == []


def test_the_checkpoints_weights_are_in_the_repository_without_being_copied(
    wide_folder: Path, wide_repository: Path
) -> None:
    record = json.loads((wide_repository / "hypergen.json").read_text())
    for component in STABLE_DIFFUSION:
        (weights,) = (wide_folder / component.module).glob("*.safetensors")
        assert (wide_repository / component.name / "1" / weights.name).samefile(weights)
        assert record["components"][component.name]["weights"] == {weights.name: sha256([weights])}
    assert export(ExportRequest(model=str(wide_folder), output=wide_repository)) == ExportResult()


def test_an_export_whose_weights_were_overwritten_with_its_checkpoint_is_not_reused(
    wide_folder: Path, wide_repository: Path, tmp_path: Path
) -> None:
    """Whoever saves into the checkpoint writes to the linked files; the old weights are served from elsewhere then."""
    checkpoint = Path(shutil.copytree(wide_folder, tmp_path / "checkpoint"))
    output = Path(shutil.copytree(wide_repository, tmp_path / "repository"))
    weights = checkpoint / "text_encoder" / "model.safetensors"
    place = output / "text_encoder" / "1" / weights.name
    place.unlink()
    place.hardlink_to(weights)
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + bytes(2))
    assert sha256([place]) != sha256([wide_folder / "text_encoder" / weights.name])
    again = ExportRequest(model=str(wide_folder), output=output, model_id="tiny/wide")
    assert export(again) == ExportResult(converted=("text_encoder",), reused=NAMES[1:])
    assert sha256([output / "text_encoder" / "1" / weights.name]) == sha256(
        [wide_folder / "text_encoder" / weights.name]
    )


def test_what_is_linked_needs_no_space(wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_GRAPH_BYTES", 0)

    def needed(folder: Path, output: Path, dtype: str = "float32") -> int:
        request = ExportRequest(model=str(folder), output=output, dtype=dtype)
        task = ExportTask(open_checkpoint(str(folder)), request, PreviousExport(output, {}), (), None)
        return task.bytes_to_write

    assert needed(wide_folder, tmp_path / "repository") == 0
    stored = sum((wide_folder / each.module / WEIGHTS[each.module]).stat().st_size for each in STABLE_DIFFUSION)
    if Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        assert needed(wide_folder, Path("/dev/shm/repository")) == stored
    pickled = Path(shutil.copytree(wide_folder, tmp_path / "pickled"))
    weights = pickled / "text_encoder" / WEIGHTS["text_encoder"]
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    elements = sum(tensor.numel() for tensor in load_file(weights).values())
    weights.unlink()
    assert needed(pickled, tmp_path / "repository") >= 4 * elements
    unet = wide_folder / "unet" / WEIGHTS["unet"]
    quantized = needed(wide_folder, tmp_path / "repository", "int8-weights")
    assert 0.99 * unet.stat().st_size / 2 < quantized < unet.stat().st_size / 2


def test_a_rank_pool_needs_space(wide: Checkpoint, tmp_path: Path) -> None:
    def task(rank: int) -> ExportTask:
        request = ExportRequest(model=str(wide.folder), output=tmp_path / "repository", lora_rank=rank)
        return ExportTask(wide, request, PreviousExport(request.output, {}), (), None)

    written = 0
    for component in (each for each in task(8).own if each.pool):
        pool = PoolWeights(tmp_path / component.name)
        pool.folder.mkdir()
        pool.create(component.module, load_module(wide, component), LoraPool(rank=8, kernels=True), torch.float32)
        written += pool.file.stat().st_size
    assert written <= task(16).bytes_to_write - task(8).bytes_to_write + 2**16 <= 1.2 * written


@pytest.mark.parametrize("file", ["text_encoder/1/model.onnx", "diffusion/tokenizer.json", "unet/config.pbtxt"])
def test_a_damaged_repository_is_repaired(request_again: ExportRequest, file: str) -> None:
    intact = (request_again.output / file).read_bytes()
    (request_again.output / file).write_bytes(intact[:100])
    export(request_again)
    assert (request_again.output / file).stat().st_size > 100
    if not file.endswith(".onnx"):
        assert (request_again.output / file).read_bytes() == intact
    assert export(request_again) == ExportResult()


def test_a_folder_that_is_not_an_export_is_never_touched(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(OutputRefusedError, match="is not an export"):
        export(ExportRequest(model=str(checkpoint_folder), output=tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_checkpoint_is_never_overwritten(checkpoint_copy: Path) -> None:
    with pytest.raises(OutputRefusedError):
        export(ExportRequest(model=str(checkpoint_copy), output=checkpoint_copy))
    assert (checkpoint_copy / "model_index.json").is_file()


def test_an_export_that_fails_half_way_leaves_nothing(checkpoint_copy: Path, tmp_path: Path) -> None:
    path = checkpoint_copy / "text_encoder" / "model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match="text_encoder: the weights are not finite"):
        export(ExportRequest(model=str(checkpoint_copy), output=tmp_path / "repository"))
    assert leftovers(tmp_path) == []


def test_a_safety_checker_that_is_not_run_is_reported_by_every_export(
    checkpoint_copy: Path, request_again: ExportRequest
) -> None:
    classes = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(checkpoint_copy / "model_index.json", safety_checker=classes, requires_safety_checker=True)
    said: list[str] = []
    request = replace(request_again, model=str(checkpoint_copy))
    for _ in range(2):
        export(request, notify=said.append)
    assert said == ["the checkpoint has a safety checker, which is not run: images are not filtered"] * 2


@pytest.fixture(scope="module")
def words(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that is merged and changes the text encoder alone, which takes seconds to convert."""
    file = tmp_path_factory.mktemp("words") / "words.safetensors"
    return save_with_magnitudes(file, checkpoint_folder, "text_encoder")


@pytest.fixture(scope="module")
def with_loras(checkpoint_folder: Path, repository: Path, words: Path) -> tuple[ExportRequest, ExportResult]:
    """An export beside the one without LoRAs. Read only."""
    request = ExportRequest(
        model=str(checkpoint_folder),
        output=repository.with_name("with-loras"),
        max_batch_size=4,
        model_id="tiny/one",
        loras=read_loras([f"words={words}:0.5", f"words={words}:1.5"]),
    )
    return request, export(request)


def test_a_lora_is_a_further_model_of_each_component_that_it_changes(
    with_loras: tuple[ExportRequest, ExportResult],
) -> None:
    request, result = with_loras
    variants = ("text_encoder.words@0.5", "text_encoder.words@1.5")
    assert result == ExportResult(converted=variants, reused=NAMES), "what lies beside it is taken over"
    base = read_config((request.output / "text_encoder" / "config.pbtxt").read_text())
    for name in variants:
        config = read_config((request.output / name / "config.pbtxt").read_text())
        assert config.name == name
        config.name = "text_encoder"
        assert config == base
    assert sampler_parameter(request.output, "components") == ",".join((*NAMES, *variants))
    assert json.loads(sampler_parameter(request.output, "loras")) == [
        {"name": "words", "scale": 0.5, "models": {"text_encoder": variants[0]}},
        {"name": "words", "scale": 1.5, "models": {"text_encoder": variants[1]}},
    ]
    assert export(request) == ExportResult()


def test_the_scale_is_in_the_weights(with_loras: tuple[ExportRequest, ExportResult]) -> None:
    """The smaller one lies nearer to the checkpoint as it is."""
    output = with_loras[0].output
    names = ("text_encoder", "text_encoder.words@0.5", "text_encoder.words@1.5")
    base, half, more = (hidden_states(output / name / "1" / "model.onnx") for name in names)
    assert 1e-3 < np.abs(half - base).mean() < np.abs(more - base).mean()


def hidden_states(path: Path, first: int = 0) -> Array:
    """Those of sixteen token ids in a row."""
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids, mask = (np.arange(16, dtype=np.int32) + first)[None], np.ones((1, 16), dtype=np.int32)
    return np.asarray(compiled([ids, mask, np.zeros((1, 1), dtype=np.int32)])[0])


def test_a_textual_inversion_converts_the_text_encoder_alone(
    request_again: ExportRequest, checkpoint_folder: Path, tmp_path: Path
) -> None:
    vectors = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))[:2]
    save_file({"emb_params": vectors}, tmp_path / "toy.safetensors")
    embeddings = read_embeddings([str(tmp_path / "toy.safetensors")], None)
    request = replace(request_again, embeddings=embeddings)
    before = hidden_states(request.output / "text_encoder" / "1" / "model.onnx")
    assert export(request) == ExportResult(converted=("text_encoder",), reused=NAMES[1:])
    assert sampler_parameter(request.output, "embeddings") == "toy"
    tokenizer = Tokenizer.from_file(str(request.output / "diffusion" / "tokenizer.json"))
    last = tokenizer.get_vocab_size() - 1
    assert [tokenizer.token_to_id(token) for token in ("toy", "toy_1")] == [last - 1, last]
    path = request.output / "text_encoder" / "1" / "model.onnx"
    np.testing.assert_allclose(hidden_states(path), before, atol=1e-5)
    model = CLIPTextModel.from_pretrained(checkpoint_folder / "text_encoder")
    weight = torch.cat([model.get_input_embeddings().weight, vectors])
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
    ids = np.arange(16, dtype=np.int32) + last - 15
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None].long()).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden_states(path, last - 15), expected, atol=1e-4)


def test_removing_and_adding_a_lora_converts_nothing(
    with_loras: tuple[ExportRequest, ExportResult], repository: Path, tmp_path: Path
) -> None:
    request = replace(with_loras[0], output=repository.with_name("again"))
    one = replace(request, loras=request.loras[1:])
    assert export(one) == ExportResult(reused=(*NAMES, "text_encoder.words@1.5"))
    assert export(replace(request, loras=())) == ExportResult(reused=NAMES)
    assert not (request.output / "text_encoder.words@1.5").exists()
    assert sampler_parameter(request.output, "loras") == "[]"
    assert export(one) == ExportResult(reused=(*NAMES, "text_encoder.words@1.5"))
    shutil.move(request.output, tmp_path / "elsewhere")


def test_a_lora_for_a_module_that_the_model_lacks_is_refused_before_anything_is_done(
    request_again: ExportRequest, tmp_path: Path
) -> None:
    save_file({"lora_te2_x.lora_down.weight": torch.zeros(1)}, tmp_path / "xl.safetensors")
    loras = read_loras([str(tmp_path / "xl.safetensors")])
    with pytest.raises(BadLoraError, match=r"xl\.safetensors: changes text_encoder_2, which .* does not have"):
        export(replace(request_again, loras=loras))
