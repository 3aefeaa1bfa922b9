from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.conversion.loading import load_module
from hypergen_export.errors import BrokenCheckpointError

from ..conftest import COMPONENTS, edit_json

FILES = {
    "text_encoder": Path("text_encoder") / "model.safetensors",
    "unet": Path("unet") / "diffusion_pytorch_model.safetensors",
    "vae_decoder": Path("vae") / "diffusion_pytorch_model.safetensors",
}


def load(folder: Path, name: str) -> torch.nn.Module:
    return load_module(open_checkpoint(str(folder)), COMPONENTS[name])


@pytest.mark.parametrize("name", FILES)
def test_weights_stored_as_an_fp16_variant_are_computed_in_float32(checkpoint_copy: Path, name: str) -> None:
    full = checkpoint_copy / FILES[name]
    halves = {key: value.half() for key, value in load_file(full).items()}
    save_file(halves, full.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    full.unlink()
    parameters = dict(load(checkpoint_copy, name).named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    key = next(key for key in parameters if key in halves)
    torch.testing.assert_close(parameters[key], halves[key].float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_a_broken_checkpoint(checkpoint_copy: Path, name: str) -> None:
    path = checkpoint_copy / FILES[name]
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BrokenCheckpointError, match=rf"{path}: the weights cannot be read \(it is truncated: .*\)"):
        load(checkpoint_copy, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_tensor_is_never_filled_with_random_numbers(checkpoint_copy: Path, name: str) -> None:
    path = checkpoint_copy / FILES[name]
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpointError):
        load(checkpoint_copy, name)


@pytest.mark.parametrize("name", FILES)
def test_weights_of_another_shape_are_a_broken_checkpoint(checkpoint_copy: Path, name: str) -> None:
    path = checkpoint_copy / FILES[name]
    tensors = load_file(path)
    key = min(tensors)
    save_file({**tensors, key: tensors[key].repeat(2, *[1] * (tensors[key].dim() - 1))}, path, {"format": "pt"})
    with pytest.raises(BrokenCheckpointError):
        load(checkpoint_copy, name)


# diffusers takes the one for an argument of its model, and fails.
@pytest.mark.parametrize(("name", "key"), [*product(FILES, ["torch_dtype"]), ("text_encoder", "dtype")])
def test_a_config_that_says_half_rounds_no_weights(checkpoint_copy: Path, name: str, key: str) -> None:
    stored = load_file(checkpoint_copy / FILES[name])
    edit_json(checkpoint_copy / FILES[name].parent / "config.json", **{key: "float16"})
    loaded = load(checkpoint_copy, name).state_dict()
    same = [key for key in loaded if key in stored]
    assert len(same) >= 20
    for key in same:
        torch.testing.assert_close(loaded[key], stored[key], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FILES)
def test_weights_that_are_not_finite_are_named(checkpoint_copy: Path, name: str, value: float) -> None:
    path = checkpoint_copy / FILES[name]
    tensors = load_file(path)
    key = max(name for name in tensors if name.endswith("weight"))
    tensors[key].view(-1)[7] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match=rf"^{path.parent}: the weights are not finite \({key}\)$"):
        load(checkpoint_copy, name)


def test_a_text_encoder_is_the_same_with_the_config_of_a_whole_clip(checkpoint_copy: Path) -> None:
    before = load(checkpoint_copy, "text_encoder").state_dict()
    path = checkpoint_copy / "text_encoder" / "config.json"
    outer = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512}
    path.write_text(json.dumps({**outer, "text_config": json.loads(path.read_text())}))
    after = load(checkpoint_copy, "text_encoder").state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
