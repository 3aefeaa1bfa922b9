"""An export without weights: its files refer to the checkpoint's own, and compute the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from onnxscript import ir
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import FLOAT, INT, Component, Tensor
from hypergen_export.checkpoints.families.unet import STABLE_DIFFUSION
from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.checkpoints.weights import Weights
from hypergen_export.conversion import convert as conversion
from hypergen_export.conversion.convert import Job
from hypergen_export.conversion.linking import WeightFiles, check_links, link_weights
from hypergen_export.conversion.loading import load_module, load_placeholders
from hypergen_export.conversion.merging import merge_lora
from hypergen_export.conversion.parity import Parity, compare_outputs
from hypergen_export.conversion.sources import LARGEST_LOADED, Placeholders, read_sources
from hypergen_export.conversion.wrappers import WRAPPERS
from hypergen_export.errors import BrokenCheckpointError, ConversionError
from support.loras import lora_weights, save_by_diffusers

from ..conftest import COMPONENTS, WEIGHTS, ForEngines, convert_component


def write(checkpoint: Checkpoint, component: Component, folder: Path, dtype: str = "float32") -> tuple[Path, Parity]:
    """The ONNX file and its parity."""
    path = folder / "model.onnx"
    return path, convert_component(checkpoint, component, path, dtype)


def compare_again(checkpoint: Checkpoint, component: Component, path: Path, dtype: str = "float32") -> Parity:
    """As the conversion that wrote the file did."""
    with conversion._quiet():
        job = Job(component=component, dtype=dtype, onnx=path)
        return conversion._compare(checkpoint, job, WeightFiles(path, casts=False))


def initializers(path: Path) -> Iterator[tuple[str, Any]]:
    for name, value in ir.load(path).graph.initializers.items():
        assert value.const_value is not None
        yield name, value.const_value


def external(path: Path) -> dict[str, ir.ExternalTensor]:
    return {name: tensor for name, tensor in initializers(path) if isinstance(tensor, ir.ExternalTensor)}


@pytest.mark.parametrize("component", STABLE_DIFFUSION, ids=lambda component: component.name)
def test_large_weights_stay_in_the_checkpoints_file_and_give_the_same_values(
    component: Component, wide: Checkpoint, wide_repository: Path
) -> None:
    path = wide_repository / component.name / "1" / "model.onnx"
    record = json.loads((wide_repository / "hypergen.json").read_text())
    weights = wide.folder / component.module / WEIGHTS[component.module]
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(["model.onnx", weights.name])
    assert (path.parent / weights.name).samefile(weights)
    difference = record["components"][component.name]["parity"]["difference"]
    assert difference <= (1 if component.name == "vae_decoder" else 1e-5)
    linked, stored = external(path), load_file(weights)
    assert {name for name, tensor in stored.items() if tensor.numel() > LARGEST_LOADED} >= linked.keys() != set()
    assert all(tensor.size <= LARGEST_LOADED for name, tensor in initializers(path) if name not in linked)


def test_for_an_engine_builder_every_precision_links_the_same_file(
    wide_folder: Path, for_engines: Callable[[str, str, str], ForEngines]
) -> None:
    weights = wide_folder / "text_encoder" / WEIGHTS["text_encoder"]
    places = []
    for dtype in ("float32", "float16", "bfloat16"):
        path = for_engines("wide", "text_encoder", dtype).onnx
        assert (path.parent / weights.name).samefile(weights)
        places.append({name: (tensor.dtype, tensor.offset) for name, tensor in external(path).items()})
    assert places[0] == places[1] == places[2]
    assert {kind for kind, _ in places[0].values()} == {ir.DataType.FLOAT}


def test_what_openvino_would_cast_is_written_once(wide: Checkpoint, tmp_path: Path) -> None:
    path, _ = write(wide, COMPONENTS["text_encoder"], tmp_path, "bfloat16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.safetensors"]
    stored = load_file(wide.folder / "text_encoder" / WEIGHTS["text_encoder"])
    written = load_file(path.with_name("model.onnx.safetensors"))
    assert written.keys() == external(path).keys() != set()
    assert all(torch.equal(tensor, stored[name].to(torch.bfloat16)) for name, tensor in written.items())


def test_shards_are_linked_one_by_one(wide_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide_folder, tmp_path / "checkpoint"))
    whole = folder / "text_encoder" / WEIGHTS["text_encoder"]
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors, key=lambda name: tensors[name].numel())  # so that either file has large ones
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "text_encoder" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    path, parity = write(open_checkpoint(str(folder)), COMPONENTS["text_encoder"], tmp_path / "linked")
    assert parity.difference < 1e-5
    for name, tensor in external(path).items():
        assert name in shards[str(tensor.location)]
    assert all((path.parent / file).samefile(folder / "text_encoder" / file) for file in shards)


def test_a_file_that_a_link_of_the_hubs_cache_leads_to_is_linked(wide_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide_folder, tmp_path / "checkpoint"))
    weights = folder / "text_encoder" / WEIGHTS["text_encoder"]
    blob = Path(shutil.move(weights, folder / "blob"))
    weights.symlink_to(blob)
    path, _ = write(open_checkpoint(str(folder)), COMPONENTS["text_encoder"], tmp_path / "linked")
    assert (path.parent / weights.name).samefile(blob)
    assert not (path.parent / weights.name).is_symlink()


def test_pickled_weights_are_written_in_the_exports_precision(wide_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide_folder, tmp_path / "checkpoint"))
    weights = folder / "text_encoder" / WEIGHTS["text_encoder"]
    stored = load_file(weights)
    torch.save(stored, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        path, _ = write(open_checkpoint(str(folder)), COMPONENTS["text_encoder"], tmp_path / name, name)
        written = load_file(path.with_name("model.onnx.safetensors"))
        assert written.keys() == external(path).keys() == {n for n, t in stored.items() if t.numel() > LARGEST_LOADED}
        assert all(torch.equal(written[name], stored[name].to(dtype)) for name in written)


def test_only_what_a_lora_changes_is_written(wide: Checkpoint, tmp_path: Path) -> None:
    layers = lora_weights(wide.folder, "text_encoder")
    (lora,) = read_loras([f"{save_by_diffusers(tmp_path / 'lora', layers)}:0.5"])
    component = COMPONENTS["text_encoder"]
    merged = load_module(wide, component)
    merge_lora("text_encoder", merged, lora)
    path, parity = write(wide, component.with_lora(lora), tmp_path / "linked")
    assert parity.difference < 1e-5
    written = load_file(path.with_name("model.onnx.safetensors"))
    unchanged = load_module(wide, component).state_dict()
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, unchanged[n])}
    stems = {name.removeprefix("text_model.") for name in written}
    assert stems
    assert stems == {n for n in changed if unchanged[n].numel() > LARGEST_LOADED}
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, merged.state_dict()[name.removeprefix("text_model.")], rtol=0, atol=0)
    assert {str(tensor.location) for tensor in external(path).values()} == {
        "model.onnx.safetensors",
        WEIGHTS["text_encoder"],
    }


def test_of_a_large_unet_the_outer_levels_are_compared(
    wide: Checkpoint, wide_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_LARGE_BYTES", 0)
    compared: list[int] = []

    def count(component: Component, expected: Any, sizes: Any, path: Path, dtype: str) -> Parity:
        compared.append(len(external(path)))
        return compare_outputs(component, expected, sizes, path, dtype)

    monkeypatch.setattr(conversion, "compare_outputs", count)
    path = Path(shutil.copytree(wide_repository / "unet" / "1", tmp_path / "linked")) / "model.onnx"
    assert compare_again(wide, COMPONENTS["unet"], path).difference < 1e-5
    assert 0 < compared[0] < len(external(path))
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(["model.onnx", WEIGHTS["unet"]])


@pytest.mark.parametrize(("family", "encoder"), [("flux1-dev", "T5"), ("stable-diffusion-3", "CLIP-G")])
def test_of_a_large_text_encoder_two_layers_are_compared(
    family: str,
    encoder: str,
    for_engines: Callable[[str, str, str], ForEngines],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = for_engines(family, "text_encoder_2", "bfloat16")
    path = Path(shutil.copytree(whole.onnx.parent, tmp_path / "1")) / whole.onnx.name
    monkeypatch.setattr(conversion, "_LARGE_BYTES", 0)
    compared: list[int] = []

    def count(component: Component, expected: Any, sizes: Any, path: Path, dtype: str) -> Parity:
        compared.append(len(list(ir.load(path).graph)))
        return compare_outputs(component, expected, sizes, path, dtype)

    monkeypatch.setattr(conversion, "compare_outputs", count)
    parity = compare_again(whole.checkpoint, whole.component, path, "bfloat16")
    print(f"{encoder}: {parity.difference:.2g} from torch in float32")
    assert compared[0] < 0.8 * len(list(ir.load(path).graph)), "two of three layers"
    types = {tensor.dtype.name for _, tensor in initializers(path) if tensor.size > 4096}
    assert "BFLOAT16" in types
    assert "FLOAT" not in types


def test_a_place_that_is_not_the_tensors_is_an_error(wide_repository: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(wide_repository / "text_encoder", tmp_path / "text_encoder")) / "1" / "model.onnx"
    model = ir.load(path)
    name, tensor = next(iter(external(path).items()))
    moved = ir.ExternalTensor(
        location=str(tensor.location),
        offset=(tensor.offset or 0) + 2,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=name,
    )
    model.graph.initializers[name].const_value = moved
    ir.save(model, path)
    with pytest.raises(ConversionError, match=f"text_encoder: {name} is not where the ONNX file says"):
        check_links(path)


def test_the_same_tensors_are_wrong_for_either_way_of_loading(wide_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide_folder, tmp_path / "checkpoint"))
    weights = folder / "unet" / WEIGHTS["unet"]
    tensors = load_file(weights)
    name = "mid_block.resnets.0.conv1.weight"
    assert tensors[name].numel() > LARGEST_LOADED
    for change in (
        lambda: tensors[name].view(-1)[70_000:70_001].fill_(torch.inf),
        lambda: tensors.update({name: tensors[name][:, :-1].contiguous()}),
        lambda: tensors.pop(name),
    ):
        change()
        save_file(tensors, weights, {"format": "pt"})
        reasons = []
        for load in (load_module, load_placeholders):
            with pytest.raises(BrokenCheckpointError) as caught:
                load(open_checkpoint(str(folder)), COMPONENTS["unet"])
            reasons.append(str(caught.value).partition("(")[0])
        assert reasons[0] == reasons[1]


def test_a_wrapper_that_computes_with_weights_is_refused(
    wide: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = WRAPPERS["text_encoder"]

    def scale(module: Any) -> torch.nn.Module:
        layer = module.encoder.layers[0].mlp.fc1
        layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
        return own(module)

    monkeypatch.setitem(WRAPPERS, "text_encoder", scale)
    with pytest.raises(ConversionError, match=r"text_encoder: .*fc1\.weight: is computed from weights"):
        write(wide, COMPONENTS["text_encoder"], tmp_path / "linked")


class T5(torch.nn.Module):
    """A text encoder whose embeddings have two names."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(input_ids.to(torch.int64)).last_hidden_state
        shared: torch.Tensor = self.encoder.shared.weight
        return hidden.to(torch.float32) + 0 * shared.to(torch.float32).mean()


@pytest.fixture
def with_others(wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint that also has modules, in bfloat16, which no family has."""
    folder = Path(shutil.copytree(wide_folder, tmp_path / "checkpoint"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=600, d_model=256, d_kv=64, d_ff=512, num_layers=1, num_heads=4)
        )
    encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder_3")
    monkeypatch.setitem(WRAPPERS, "t5", T5)
    return open_checkpoint(str(folder))


ENCODER = Component(
    name="text_encoder_3",
    module="text_encoder_3",
    loader="transformers.T5EncoderModel",
    wrapper="t5",
    inputs=(Tensor(name="input_ids", dtype=INT, axes=("tokens",), example="prompt"),),
    outputs=(Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=("tokens", 256)),),
    tolerance=1e-3,
)


def test_tied_weights_are_linked_once(with_others: Checkpoint, tmp_path: Path) -> None:
    path, parity = write(with_others, ENCODER, tmp_path / "linked")
    assert parity.difference < 1e-5
    assert [name for name in external(path) if name.endswith(("shared.weight", "embed_tokens.weight"))] == [
        "shared.weight"
    ]


def test_an_initializer_may_have_the_name_of_its_weight(tmp_path: Path) -> None:
    """As the embedding of Z-Image's text encoder has."""
    save_file({"embed.weight": torch.randn(512, 256)}, tmp_path / "model.safetensors")
    (source,) = read_sources(tmp_path, Weights(files=("model.safetensors",), format="safetensors", variant="")).values()
    placeholders = Placeholders()
    tensor = ir.tensor(placeholders.make(source), name="embed.weight")
    weight = ir.Value(
        name="embed.weight", shape=ir.Shape(source.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    node = ir.node("Identity", [weight])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18})
    (tmp_path / "1").mkdir()
    files = WeightFiles(tmp_path / "1" / "model.onnx", casts=False)
    link_weights(ir.Model(graph, ir_version=10), placeholders, files, torch.float32)
    (linked,) = graph.initializers.values()
    assert isinstance(linked.const_value, ir.ExternalTensor)
    assert node.inputs == (linked,)


def test_a_packed_transformer_can_be_loaded_without_weights(with_others: Checkpoint) -> None:
    """Its module is complete: every parameter is one of the file, and every computed buffer as its library makes it."""
    module, placeholders = load_placeholders(with_others, ENCODER)
    whole = load_module(with_others, ENCODER)
    placeholders.load(module)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in module.state_dict().items())
    for (name, buffer), (_, expected) in zip(module.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
