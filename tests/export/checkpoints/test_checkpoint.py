from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hypergen_export.checkpoints.checkpoint import (
    SHIPPED_MODEL,
    SHIPPED_TRANSFORMER,
    Checkpoint,
    Replacement,
    open_checkpoint,
)
from hypergen_export.checkpoints.families.tensors import PREVIEW_DECODER
from hypergen_export.errors import (
    BrokenCheckpointError,
    ExportError,
    NotADiffusersPipelineError,
    UnknownModelError,
    UnsupportedModelError,
)
from support.miniature import save_miniature, save_tiny_vae

from ..conftest import edit_json


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(tmp_path_factory.mktemp("xl") / "miniature", family="sdxl")


@pytest.fixture
def xl_copy(xl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(xl_folder, tmp_path / "xl"))


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
        "context_width": 32,
        "deep_channels": 16,
        "time_width": 16,
        "sizes_width": 0,
        "latent_channels": 4,
        "masked_channels": 5,
        "token_width": 4,
        "max_clip_skip": 2,
        "vae_scale_factor": 8,
        "patch_size": 1,
    }


def test_a_missing_folder_is_an_unknown_model(tmp_path: Path) -> None:
    assert "no such folder" in refusal(UnknownModelError, tmp_path / "nowhere")
    assert "no such folder" in refusal(UnknownModelError, "neither-path-nor-id")


def test_a_file_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert "is a file" in refusal(NotADiffusersPipelineError, tmp_path / "model.ckpt")


def test_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(NotADiffusersPipelineError, tmp_path)


@pytest.mark.parametrize("pipeline", ["AuraFlowPipeline", None])
def test_another_family_is_unsupported_and_the_known_ones_are_named(checkpoint_copy: Path, pipeline: str) -> None:
    edit_json(checkpoint_copy / "model_index.json", _class_name=pipeline)
    message = refusal(UnsupportedModelError, checkpoint_copy)
    assert str(pipeline) in message
    assert "StableDiffusionPipeline" in message


def test_a_part_of_another_class_is_unsupported(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])
    assert "diffusers.AsymmetricAutoencoderKL" in refusal(UnsupportedModelError, checkpoint_copy)


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        ("unet", {"in_channels": 8}, "needs image_latents, which is not supported for StableDiffusionPipeline"),
        ("unet", {"in_channels": 16}, "16 channels, its VAE gives 4"),
        ("unet", {"addition_embed_type": "text_time"}, "needs size_embeds and text_embeds"),
        ("unet", {"addition_embed_type": "image"}, "added conditions (image)"),
        (
            "unet",
            {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"},
            "projects the encoder's hidden states",
        ),
        ("unet", {"cross_attention_dim": 64}, "reads 64 features per token, its text encoders give 32"),
        ("unet", {"class_embed_type": "timestep"}, "class label"),
        ("unet", {"time_embedding_type": "fourier"}, "uses another timestep embedding (fourier)"),
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


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_git_lfs_pointer_in_place_of_a_config_is_named(checkpoint_copy: Path, file: str) -> None:
    (checkpoint_copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(BrokenCheckpointError, checkpoint_copy)


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_git_lfs_pointer_in_place_of_weights_is_named(checkpoint_copy: Path, file: str) -> None:
    (checkpoint_copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = refusal(BrokenCheckpointError, checkpoint_copy)
    assert file in message
    assert "it is a git-LFS pointer: run 'git lfs pull'" in message


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "diffusion_pytorch_model-00001-of-00001.safetensors", "b": "other.safetensors"}, "other.safetensors"),
        ([], "is not an index of weights"),
    ],
)
def test_an_index_that_names_no_files_that_are_there_is_a_broken_checkpoint(
    weight_map: object, said: str, checkpoint_copy: Path
) -> None:
    folder = checkpoint_copy / "unet"
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert said in refusal(BrokenCheckpointError, checkpoint_copy)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["transformers", "BertTokenizer"], "transformers.BertTokenizer"),
        (["transformers", "T5Tokenizer"], "transformers.T5Tokenizer"),
        ([None, None], "none"),
        (None, "none"),
    ],
)
def test_a_tokenizer_of_another_class_is_unsupported(checkpoint_copy: Path, given: object, said: str) -> None:
    edit_json(checkpoint_copy / "model_index.json", tokenizer=given)
    message = refusal(UnsupportedModelError, checkpoint_copy)
    assert f"its tokenizer is {said}, but only transformers.CLIPTokenizer is supported" in message


def test_a_text_encoders_config_may_be_that_of_a_whole_clip(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "text_encoder" / "config.json"
    own = json.loads(path.read_text())
    before = open_checkpoint(str(checkpoint_copy)).sizes
    outer = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512, "text_config": own}
    path.write_text(json.dumps(outer))
    assert open_checkpoint(str(checkpoint_copy)).sizes == before


def test_what_a_text_encoders_config_leaves_out_is_as_transformers_has_it(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "text_encoder" / "config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in own.items() if key != "vocab_size"}))
    assert open_checkpoint(str(checkpoint_copy)).sizes["vocabulary"] == 49408


def test_a_tokenizer_without_a_length_takes_the_text_encoders(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert open_checkpoint(str(checkpoint_copy)).sizes["tokens"] == 16


@pytest.mark.parametrize(("model", "family"), [(SHIPPED_MODEL, "stable-diffusion"), (SHIPPED_TRANSFORMER, "z-image")])
def test_the_shipped_models_are_in_the_checkout(model: str, family: str) -> None:
    assert open_checkpoint(model).family.name == family


@pytest.mark.parametrize(
    ("miniature", "family"),
    [
        ("sd-2", "stable-diffusion"),
        ("lcm", "latent-consistency"),
        ("sdxl", "stable-diffusion-xl"),
        ("lcm-sdxl", "latent-consistency-xl"),
    ],
)
def test_index_and_unet_tell_the_family(miniature: str, family: str, tmp_path: Path) -> None:
    assert open_checkpoint(str(save_miniature(tmp_path, family=miniature))).family.name == family


def test_a_stable_diffusion_pipeline_with_a_guidance_embedding_is_latent_consistency(tmp_path: Path) -> None:
    folder = save_miniature(tmp_path, family="lcm")
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert open_checkpoint(str(folder)).family.name == "latent-consistency"


def test_xls_sizes_are_those_of_both_text_encoders(xl_copy: Path) -> None:
    sizes = open_checkpoint(str(xl_copy)).sizes
    assert (sizes["text_width"], sizes["text_width_2"], sizes["context_width"]) == (32, 48, 80)
    assert (sizes["pooled_width"], sizes["tokens"]) == (40, 16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"_class_name": "CogView4Pipeline", "transformer": ["diffusers", "CogView4Transformer2DModel"]},
            "its denoiser is a transformer",
        ),
        (
            {"_class_name": "FluxFillPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
            "its transformer takes a mask and a masked image beside the latents",
        ),
        (
            {"_class_name": "FluxControlPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
            "its transformer takes a control image beside the latents",
        ),
        (
            {"_class_name": "StableDiffusionXLControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]},
            "it needs a control image beside the prompt (ControlNet)",
        ),
        ({"_class_name": "StableDiffusionXLControlNetInpaintPipeline"}, "ControlNet"),
        ({"_class_name": "StableDiffusionInstructPix2PixPipeline"}, "its UNet needs size_embeds and text_embeds"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "it is an upscaler"),
        (
            {"_class_name": "AnimateDiffPipeline", "motion_adapter": ["diffusers", "MotionAdapter"]},
            "generates videos",
        ),
        (
            {
                "_class_name": "StableDiffusionXLImg2ImgPipeline",
                "requires_aesthetics_score": True,
                "text_encoder": [None, None],
            },
            "it is a refiner",
        ),
        ({"text_encoder_2": [None, None]}, "its text_encoder_2 is none"),
    ],
)
def test_an_unsupported_pipeline_is_rejected_with_the_reason(
    xl_copy: Path, changes: dict[str, object], said: str
) -> None:
    edit_json(xl_copy / "model_index.json", **changes)
    message = refusal(UnsupportedModelError, xl_copy)
    assert said in message


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        ("transformer", {"in_channels": 16}, "its transformer has 16 in_channels, its VAE gives 32"),
        ("transformer", {"out_channels": 64}, "its transformer has 64 out_channels"),
        ("transformer", {"patch_size": 2}, "patches of 2"),
        ("transformer", {"caption_channels": 2304}, "reads 2304 features per token, its text encoders give 64"),
        ("transformer", {"interpolation_scale": 2.0}, "as those of 2048 and 4096 pixels have"),
        ("transformer", {"guidance_embeds": True}, "needs guidance"),
        ("transformer", {"timestep_scale": 1000.0}, "scales timesteps by 1000.0"),
        ("text_encoder", {"sliding_window": 256}, "its text encoder would read 459 tokens"),
        ("text_encoder", {"use_bidirectional_attention": True}, "attends to later tokens"),
        ("vae", {"decoder_norm_types": ["batch_norm", "rms_norm"]}, "its VAE normalises by"),
    ],
)
def test_a_sana_of_another_kind_is_unsupported(
    module: str, changes: dict[str, object], said: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_of("sana"), tmp_path / "sana")
    edit_json(folder / module / "config.json", **changes)
    assert said in refusal(UnsupportedModelError, folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"addition_embed_type": None}, "does not take size_embeds and text_embeds"),
        ({"projection_class_embeddings_input_dim": 40 + 5 * 8}, "other size conditioning than six numbers"),
        ({"in_channels": 5}, "a depth map"),
    ],
)
def test_an_xl_unet_of_another_kind_is_unsupported(xl_copy: Path, changes: dict[str, object], said: str) -> None:
    edit_json(xl_copy / "unet" / "config.json", **changes)
    assert said in refusal(UnsupportedModelError, xl_copy)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_second_part_is_named(xl_copy: Path, part: str) -> None:
    shutil.rmtree(xl_copy / part)
    assert part in refusal(BrokenCheckpointError, xl_copy)


@pytest.mark.parametrize(("channels", "family"), [(4, "stable-diffusion"), (9, "stable-diffusion-inpainting")])
def test_an_inpainting_pipeline_is_told_by_the_channels_of_its_unet(
    channels: int, family: str, checkpoint_copy: Path
) -> None:
    edit_json(checkpoint_copy / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    edit_json(checkpoint_copy / "unet" / "config.json", in_channels=channels)
    assert open_checkpoint(str(checkpoint_copy)).family.name == family


def test_a_unet_that_pools_the_prompt_by_itself_is_supported(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "unet" / "config.json", addition_embed_type="text")
    assert open_checkpoint(str(checkpoint_copy)).family.name == "stable-diffusion"


def test_a_tiny_vae_is_refused_for_models_that_edit_by_instruction(tmp_path: Path) -> None:
    """They are given the image in the scale of an AutoencoderKL, which a tiny one does not know."""
    folder = save_miniature(tmp_path / "editor", family="instruct-pix2pix")
    shutil.rmtree(folder / "vae")
    save_tiny_vae(folder / "vae")
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert refusal(UnsupportedModelError, folder).endswith("an AutoencoderTiny can only be its --preview-vae")


def test_a_preview_vae_without_the_widths_of_its_blocks_is_refused(checkpoint_folder: Path, tmp_path: Path) -> None:
    save_tiny_vae(tmp_path / "tiny")
    edit_json(tmp_path / "tiny" / "config.json", decoder_block_out_channels=None)
    preview = {PREVIEW_DECODER.module: Replacement(folder=tmp_path / "tiny", loader="diffusers.AutoencoderTiny")}
    with pytest.raises(UnsupportedModelError, match=r"--preview-vae: its config\.json has None as decoder_block_out_c"):
        open_checkpoint(str(checkpoint_folder), preview)
