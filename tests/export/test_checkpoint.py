from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hypergen_export.checkpoint import SHIPPED_MODEL, Checkpoint, open_checkpoint
from hypergen_export.errors import (
    BrokenCheckpointError,
    ExportError,
    NotADiffusersPipelineError,
    UnknownModelError,
    UnsupportedModelError,
)

from .conftest import edit_json


def refusal(kind: type[ExportError], model: Path | str) -> str:
    """The one line with which `model` is refused."""
    with pytest.raises(kind) as caught:
        open_checkpoint(str(model))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_miniature_is_a_stable_diffusion(checkpoint: Checkpoint) -> None:
    assert checkpoint.family.name == "stable-diffusion"
    assert checkpoint.sizes == {
        "tokens": 16,
        "vocabulary": 540,
        "text_width": 32,
        "latent_channels": 4,
        "vae_scale_factor": 8,
    }


def test_a_missing_folder_is_an_unknown_model(tmp_path: Path) -> None:
    assert "no such folder" in refusal(UnknownModelError, tmp_path / "nowhere")
    assert "no such folder" in refusal(UnknownModelError, "neither-path-nor-id")


def test_a_file_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert "is a file" in refusal(NotADiffusersPipelineError, tmp_path / "model.ckpt")


def test_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(NotADiffusersPipelineError, tmp_path)


@pytest.mark.parametrize("pipeline", ["StableDiffusionXLPipeline", "FluxPipeline", None])
def test_another_family_is_unsupported_and_the_known_ones_are_named(checkpoint_copy: Path, pipeline: str) -> None:
    edit_json(checkpoint_copy / "model_index.json", _class_name=pipeline)
    message = refusal(UnsupportedModelError, checkpoint_copy)
    assert str(pipeline) in message
    assert "StableDiffusionPipeline" in message


def test_a_part_of_another_class_is_unsupported(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert "diffusers.AutoencoderTiny" in refusal(UnsupportedModelError, checkpoint_copy)


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        ("unet", {"in_channels": 9}, "inpainting"),
        ("unet", {"addition_embed_type": "text_time"}, "added conditions"),
        ("unet", {"class_embed_type": "timestep"}, "class label"),
        ("unet", {"time_cond_proj_dim": 256}, "guidance as an embedding"),
        ("text_encoder", {"use_attention_mask": True}, "attention mask"),
    ],
)
def test_a_config_that_wants_other_inputs_is_unsupported(
    checkpoint_copy: Path, module: str, changes: dict[str, object], said: str
) -> None:
    edit_json(checkpoint_copy / module / "config.json", **changes)
    assert said in refusal(UnsupportedModelError, checkpoint_copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(checkpoint_copy: Path, part: str) -> None:
    shutil.rmtree(checkpoint_copy / part)
    message = refusal(BrokenCheckpointError, checkpoint_copy)
    assert part in message
    assert "missing" in message


def test_missing_weights_are_named(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet: no weights" in refusal(BrokenCheckpointError, checkpoint_copy)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_broken_json_is_named(checkpoint_copy: Path, file: str, content: str) -> None:
    (checkpoint_copy / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert file in refusal(BrokenCheckpointError, checkpoint_copy)


def test_a_config_without_a_size_is_broken(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "vae" / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key[0] != "l"}))
    assert "latent_channels" in refusal(BrokenCheckpointError, checkpoint_copy)


def test_a_tokenizer_without_a_length_takes_the_text_encoders(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert open_checkpoint(str(checkpoint_copy)).sizes["tokens"] == 16


def test_the_shipped_model_is_in_the_checkout() -> None:
    assert open_checkpoint(SHIPPED_MODEL).family.name == "stable-diffusion"


def test_a_unet_that_pools_the_prompt_by_itself_is_supported(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "unet" / "config.json", addition_embed_type="text")
    assert open_checkpoint(str(checkpoint_copy)).family.name == "stable-diffusion"
