"""Every kind of single file becomes the diffusers folder that it was made of: the same tensors, the same modules."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hypergen_export.errors import BrokenCheckpointError, NotADiffusersPipelineError, UnsupportedModelError
from hypergen_export.single_files.folder import Converted, convert_single_file
from support.single_files import MINIATURES, save_folder, save_single_file

Tensors = dict[str, torch.Tensor]
Folder = Callable[[str], Path]
File = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A kind's miniature in diffusers' layout."""
    return functools.cache(lambda kind: save_folder(tmp_path_factory.mktemp("folders") / kind, kind))


@pytest.fixture(scope="module")
def file_of(folder_of: Folder, tmp_path_factory: pytest.TempPathFactory) -> File:
    """The same as a single file."""
    place = tmp_path_factory.mktemp("files")
    return functools.cache(lambda kind: save_single_file(place / f"{kind}.safetensors", folder_of(kind), kind))


def convert(file: Path, tmp_path: Path, prediction_type: str | None = None) -> tuple[Path, Converted]:
    folder = tmp_path / "converted"
    return folder, convert_single_file(file, folder, prediction_type, lambda _: None)


def tensors_of(module: Path) -> Tensors:
    (weights,) = module.glob("*.safetensors")
    return {name.removeprefix("text_model."): tensor for name, tensor in load_file(weights).items()}


def assert_same_tensors(converted: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    modules = [place.parent.name for place in folder.glob("*/config.json")]
    assert sorted(place.parent.name for place in converted.glob("*/config.json")) == sorted(modules)
    for module in modules:
        expected, given = tensors_of(folder / module), tensors_of(converted / module)
        assert given.keys() == expected.keys(), module
        for name, tensor in expected.items():
            assert given[name].dtype == dtype
            assert torch.equal(given[name], tensor.to(dtype)), name


def output_of(folder: Path, module: str) -> torch.Tensor:
    """What a module computes: its config is right if this is."""
    index = json.loads((folder / "model_index.json").read_text())
    library, name = index[module]
    loaded: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    network = loaded.from_pretrained(folder / module).float().eval()
    random = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        if module == "vae":
            pixels = torch.randn(1, 3, 32, 32, generator=random)
            latents: torch.Tensor = network.encode(pixels).latent_dist.mean * network.config.scaling_factor
            return torch.cat([latents.flatten(), network.decode(latents).sample.flatten()])
        if module.startswith("text_encoder"):
            encoded = network(torch.tensor([[49406, 320, 1125, 539, 49407, *[0] * 72]]))
            pooled = encoded.text_embeds if name.endswith("Projection") else encoded.pooler_output
            return torch.cat([encoded.last_hidden_state.flatten(), pooled.flatten()])
        config = network.config
        sample = torch.randn(1, config.in_channels, 8, 8, generator=random)
        states = torch.randn(1, 77, config.cross_attention_dim, generator=random)
        sizes = {"text_embeds": torch.randn(1, 64, generator=random), "time_ids": torch.arange(6)[None].float()}
        noise: torch.Tensor = network(sample, 500, states, added_cond_kwargs=sizes).sample
        return noise


def assert_same_models(converted: Path, folder: Path) -> None:
    for place in folder.glob("*/config.json"):
        module = place.parent.name
        # The weights are equal bit by bit; where a file places them in memory decides how sums are rounded.
        torch.testing.assert_close(output_of(converted, module), output_of(folder, module), rtol=1e-5, atol=1e-5)


def scheduler_of(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, index["scheduler"][1])
    taken = inspect.signature(kind.__init__).parameters
    config = kind.from_pretrained(folder / "scheduler").config
    return {"_class_name": kind.__name__, **{name: value for name, value in config.items() if name in taken}}


def assert_same_scheduler(converted: Path, folder: Path) -> None:
    given, expected = scheduler_of(converted), scheduler_of(folder)
    schedule = ("_class_name", "prediction_type", "beta_start", "beta_end", "beta_schedule", "steps_offset")
    for name in (*schedule, "timestep_spacing", "rescale_betas_zero_snr", "skip_prk_steps", "set_alpha_to_one"):
        assert given.get(name) == expected.get(name), name


@pytest.mark.parametrize("kind", MINIATURES)
def test_a_file_becomes_the_folder_that_it_was_made_of(
    kind: str, folder_of: Folder, file_of: File, tmp_path: Path
) -> None:
    option = "epsilon" if kind == "sd-2-base" else None
    converted, _ = convert(file_of(kind), tmp_path, option)
    assert_same_tensors(converted, folder_of(kind))
    assert_same_models(converted, folder_of(kind))
    assert_same_scheduler(converted, folder_of(kind))
    theirs, ours = (json.loads((each / "model_index.json").read_text()) for each in (folder_of(kind), converted))
    assert theirs.items() <= ours.items()
    for tokenizer in folder_of(kind).glob("tokenizer*/*"):
        assert (converted / tokenizer.parent.name / tokenizer.name).read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize(("kind", "side"), [("sd-2", 768), ("sd-2-base", 512)])
def test_images_are_by_default_as_large_as_those_of_the_training(
    kind: str, side: int, file_of: File, tmp_path: Path
) -> None:
    converted, _ = convert(file_of(kind), tmp_path, "epsilon" if kind == "sd-2-base" else None)
    assert json.loads((converted / "unet" / "config.json").read_text())["sample_size"] == side // 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype: torch.dtype, folder_of: Folder, tmp_path: Path) -> None:
    file = save_single_file(tmp_path / "half.safetensors", folder_of("sd-1"), "sd-1", dtype)
    assert_same_tensors(convert(file, tmp_path)[0], folder_of("sd-1"), dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_becomes_bfloat16_which_holds_all_its_values(dtype: torch.dtype, folder_of: Folder, tmp_path: Path) -> None:
    file = save_single_file(tmp_path / "eighth.safetensors", folder_of("sd-1"), "sd-1", dtype)
    converted = tensors_of(convert(file, tmp_path)[0] / "unet")
    for name, tensor in tensors_of(folder_of("sd-1") / "unet").items():
        assert converted[name].dtype == torch.bfloat16
        assert torch.equal(converted[name].float(), tensor.to(dtype).float()), name


def test_a_ckpt_is_read_without_running_it(folder_of: Folder, tmp_path: Path) -> None:
    file = save_single_file(tmp_path / "model.ckpt", folder_of("sd-1"), "sd-1")
    assert_same_tensors(convert(file, tmp_path)[0], folder_of("sd-1"))


def test_names_without_text_model_are_completed(folder_of: Folder, file_of: File, tmp_path: Path) -> None:
    """As some mergers wrote them."""
    text = "cond_stage_model.transformer."
    broken = {name.replace(f"{text}text_model.", text): each for name, each in load_file(file_of("sd-1")).items()}
    save_file(broken, tmp_path / "merged.safetensors")
    assert_same_tensors(convert(tmp_path / "merged.safetensors", tmp_path)[0], folder_of("sd-1"))


def test_averaged_weights_are_not_served_and_the_start_says_so(
    folder_of: Folder, file_of: File, tmp_path: Path
) -> None:
    tensors = load_file(file_of("sd-1"))
    unet = [name for name in tensors if name.startswith("model.diffusion_model.")]
    averaged = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensors[name] * 2 for name in unet}
    save_file(tensors | averaged, tmp_path / "full.safetensors")
    converted, told = convert(tmp_path / "full.safetensors", tmp_path)
    assert_same_tensors(converted, folder_of("sd-1"))
    assert any("model_ema" in notice for notice in told.notices)


def test_superfluous_tensors_are_named(folder_of: Folder, file_of: File, tmp_path: Path) -> None:
    tensors = load_file(file_of("sd-1")) | {"model.diffusion_model.input_blocks.1.0.extra": torch.ones(2)}
    save_file(tensors, tmp_path / "more.safetensors")
    converted, told = convert(tmp_path / "more.safetensors", tmp_path)
    assert_same_tensors(converted, folder_of("sd-1"))
    assert any("1 tensors" in each and "model.diffusion_model.input_blocks.1.0.extra" in each for each in told.notices)


def test_markers_beside_a_bare_unet_are_not_left_over(file_of: File, tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    tensors = load_file(file_of("sdxl-v"))
    markers = {name: each for name, each in tensors.items() if name in ("v_pred", "ztsnr")}
    assert len(markers) == 2
    bare = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    bare["label_emb.0.0.weight"] = torch.nn.functional.pad(bare["label_emb.0.0.weight"], (0, 6 * (256 - 8)))
    save_file(bare | markers, tmp_path / "unet.safetensors")
    folder, converted = convert(tmp_path / "unet.safetensors", tmp_path)
    assert converted.notices == ("predicts v_prediction, as the tensor v_pred says",)
    assert scheduler_of(folder)["prediction_type"] == "v_prediction"


def without(file: Path, prefix: str, tmp_path: Path) -> Path:
    kept = {name: each for name, each in load_file(file).items() if not name.startswith(prefix)}
    save_file(kept, tmp_path / "cut.safetensors")
    return tmp_path / "cut.safetensors"


@pytest.mark.parametrize(
    ("kind", "prefix", "named"),
    [
        ("sd-1", "model.diffusion_model.middle_block.1.proj_out.weight", "unet lacks 1 tensors"),
        ("sd-1", "model.diffusion_model.out.2.weight", "UNet lacks tensors: out.2.weight"),
        ("sd-1", "first_stage_model.decoder.mid.attn_1.k.bias", "vae lacks 1 tensors"),
        ("sdxl", "conditioner.embedders.1.model.ln_final.weight", "text_encoder_2 lacks 1 tensors"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", "lacks 3 tensors"),
        ("sd-1", "cond_stage_model.transformer.text_model.embeddings.token", "text_encoder lacks tensors"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    kind: str, prefix: str, named: str, file_of: File, tmp_path: Path
) -> None:
    cut = without(file_of(kind), prefix, tmp_path)
    with pytest.raises(BrokenCheckpointError, match=named) as raised:
        convert(cut, tmp_path)
    assert str(raised.value).startswith(f"{cut}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA: pass it with --lora"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("emb_params", "textual inversion"),
        ("decoder.conv_in.weight", "a VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers' layout"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder, not a whole model: see --text-encoder"),
        ("encoder.layers.0.mlp.fc1.weight", "a text encoder"),
        ("enc.blk.0.attn_q.weight", "a text encoder"),
        ("blk.0.attn_q.weight", "a text encoder"),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", "a text encoder"),
        ("model.layers.0.self_attn.q_norm.weight", "a text encoder"),
        ("something.else", "holds no model that is known"),
    ],
)
def test_other_files_are_refused_with_what_they_are(name: str, named: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(NotADiffusersPipelineError, match=named):
        convert(tmp_path / "other.safetensors", tmp_path)


def test_the_refiner_is_refused(file_of: File, tmp_path: Path) -> None:
    names = {"conditioner.embedders.1.model.": "conditioner.embedders.0.model."}
    tensors = {
        functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name): each
        for name, each in load_file(file_of("sdxl")).items()
        if not name.startswith("conditioner.embedders.0.")
    }
    save_file(tensors, tmp_path / "refiner.safetensors")
    with pytest.raises(UnsupportedModelError, match="refiner"):
        convert(tmp_path / "refiner.safetensors", tmp_path)


def test_cosxl_is_refused(file_of: File, tmp_path: Path) -> None:
    """Both kinds of it; that which edits has the tensors of an InstructPix2Pix model of XL."""
    marks = {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    save_file(load_file(file_of("sdxl")) | marks, tmp_path / "cosxl.safetensors")
    with pytest.raises(NotADiffusersPipelineError, match="CosXL, whose schedule"):
        convert(tmp_path / "cosxl.safetensors", tmp_path)


@pytest.mark.parametrize(("channels", "named"), [(5, "depth map"), (7, "upscaler"), (6, "takes 6 channels")])
def test_other_inputs_of_the_unet_are_refused(channels: int, named: str, file_of: File, tmp_path: Path) -> None:
    tensors = load_file(file_of("sd-1")) | {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, channels, 3, 3)
    }
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedModelError, match=named):
        convert(tmp_path / "other.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("model.diffusion_model.out.2.weight", torch.ones(4, 32, 3, 3, dtype=torch.int8), "quantized"),
        ("model.diffusion_model.out.2.scale_weight", torch.ones(1), "scales of an unknown kind"),
    ],
)
def test_quantized_weights_are_refused(
    name: str, tensor: torch.Tensor, named: str, file_of: File, tmp_path: Path
) -> None:
    save_file(load_file(file_of("sd-1")) | {name: tensor}, tmp_path / "small.safetensors")
    with pytest.raises(UnsupportedModelError, match=named):
        convert(tmp_path / "small.safetensors", tmp_path)


def test_a_yaml_beside_the_file_says_what_it_predicts(file_of: File, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(file_of("sd-2-base"))
    for parameterization, expected in (("{parameterization: v}", "v_prediction"), ("{linear_start: 1}", "epsilon")):
        (tmp_path / "model.yaml").write_text(f"model: {{params: {parameterization}}}")
        folder = tmp_path / expected
        told = convert_single_file(file, folder, None, lambda _: None)
        assert scheduler_of(folder)["prediction_type"] == expected
        assert any("model.yaml" in notice for notice in told.notices)
    (tmp_path / "model.yaml").write_text("model: {params: {parameterization: x0}}")
    with pytest.raises(UnsupportedModelError, match=r"model\.yaml: its parameterization is 'x0'"):
        convert_single_file(file, tmp_path / "x0", None, lambda _: None)
    (tmp_path / "model.yaml").write_text("[a list]")
    with pytest.raises(BrokenCheckpointError, match="not a config of latent diffusion"):
        convert_single_file(file, tmp_path / "list", None, lambda _: None)


class _Runs:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def test_a_pickle_that_runs_something_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "payload": _Runs(f"touch {tmp_path}/ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(UnsupportedModelError, match=r"would run posix\.system, which is never done"):
        convert(tmp_path / "evil.ckpt", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>", b"\x80\x02}q\x00.", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_broken_files_are_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises((BrokenCheckpointError, NotADiffusersPipelineError), match="broken") as raised:
        convert(tmp_path / f"broken{suffix}", tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "entry", [{"shape": [3]}, {"shape": [-1, 7]}, {"shape": "x"}, {"dtype": "F99"}, {"data_offsets": [4, 0]}]
)
def test_a_header_that_contradicts_itself_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry
    header = json.dumps({"a.weight": tensor}).encode()
    (tmp_path / "broken.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(BrokenCheckpointError, match=r"broken\.safetensors: the weights cannot be read") as raised:
        convert(tmp_path / "broken.safetensors", tmp_path)
    assert "\n" not in str(raised.value)
