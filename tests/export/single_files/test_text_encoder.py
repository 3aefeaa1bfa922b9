"""A text encoder in one file becomes the one that it was made of; configs and tokenizers are a folder's."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.conversion.loading import load_module
from hypergen_export.errors import (
    BadOptionError,
    BrokenCheckpointError,
    ExportError,
    NotADiffusersPipelineError,
    UnsupportedModelError,
)
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import SingleFileOptions
from support.single_files import save_folder, save_single_file
from support.single_text_encoders import Tensors, save_text_encoder_file, text_encoder_tensors, without_weights
from support.single_transformers import NAMES, save_transformer_file

from ..conftest import edit_json

Folder = Callable[[str], Path]
# Family -> what ComfyUI's file of each of its text encoders holds, by the file's name.
FILES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "flux1-dev": {"clip_l": ("text_encoder", "CLIP"), "t5xxl_fp16": ("text_encoder_2", "T5")},
    "stable-diffusion-3": {
        "clip_l": ("text_encoder", "CLIP"),
        "clip_g": ("text_encoder_2", "CLIP"),
        "t5xxl_fp16": ("text_encoder_3", "T5"),
    },
    "z-image": {"qwen_3_4b": ("text_encoder", "Qwen3")},
}


def request_of(model: Path, text_encoders: list[Path], place: Path, vae: Path | None = None) -> ExportRequest:
    return ExportRequest(
        model=str(model),
        output=place / "out",
        single_files=SingleFileOptions(cache_dir=place / "cache"),
        text_encoders=tuple(map(str, text_encoders)),
        vae=None if vae is None else str(vae),
    )


def held(
    ours: Checkpoint, theirs: Checkpoint, modules: set[str], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Every tensor that torch computes with is the same, to the bit."""
    components = {each.module: each for each in theirs.family.components if each.module in modules}
    assert components.keys() == modules
    for module, component in components.items():
        expected, given = (load_module(each, component).state_dict() for each in (theirs, ours))
        assert given.keys() == expected.keys()
        assert [name for name, each in expected.items() if not torch.equal(given[name], change(name, each))] == [], (
            module
        )


def as_it_is(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.mark.parametrize("family", FILES)
def test_files_in_any_order_complete_a_transformer_and_a_folder_without_weights(
    family: str, checkpoint_of: Folder, tmp_path: Path
) -> None:
    told: list[str] = []
    folder = checkpoint_of(family)
    model = save_transformer_file(tmp_path / "model.safetensors", folder, NAMES[family], "")
    files = [
        save_text_encoder_file(tmp_path / f"{name}.safetensors", folder, *made) for name, made in FILES[family].items()
    ]
    base, vae = without_weights(folder, tmp_path / "base"), next((folder / "vae").glob("*.safetensors"))
    ours = open_request(request_of(model, [*reversed(files), base], tmp_path, vae), told.append)
    assert told == [
        f"{module} is that of {name}.safetensors" for name, (module, _) in reversed([*FILES[family].items()])
    ]
    theirs = open_checkpoint(str(folder))
    held(ours, theirs, {*ours.text_encoders, "transformer", "vae"}, as_it_is)
    unsaid = ["scaling_factor", "shift_factor", "norm_num_groups", "force_upcast"]
    assert [ours.config("vae")[name] for name in unsaid] == [theirs.config("vae")[name] for name in unsaid]
    assert ours.folder_of("tokenizer") == base / "tokenizer"


def test_files_replace_the_text_encoders_of_a_folder(checkpoint_of: Folder, tmp_path: Path) -> None:
    def half(tensors: Tensors) -> Tensors:
        return {name: tensor.half() for name, tensor in tensors.items()}

    folder = checkpoint_of("flux1-dev")
    file = save_text_encoder_file(tmp_path / "t5xxl_fp16.safetensors", folder, "text_encoder_2", "T5", half)
    ours, theirs = open_request(request_of(folder, [file], tmp_path), lambda _: None), open_checkpoint(str(folder))
    assert ours.replaced.keys() == {"text_encoder_2"}
    held(ours, theirs, {"text_encoder"}, as_it_is)
    held(ours, theirs, {"text_encoder_2"}, lambda _, tensor: tensor.half().float())


def test_qwen_2_5_vl_is_read_with_its_head(checkpoint_of: Folder, tmp_path: Path) -> None:
    """No pipeline calls the head, but transformers' class has one that is not its embeddings."""
    folder = checkpoint_of("qwen-image")
    made = ("text_encoder", "Qwen2.5-VL")
    file = save_text_encoder_file(tmp_path / "qwen_2.5_vl_7b.safetensors", folder, *made)
    ours, theirs = open_request(request_of(folder, [file], tmp_path), lambda _: None), open_checkpoint(str(folder))
    held(ours, theirs, {"text_encoder"}, as_it_is)

    def headless(tensors: Tensors) -> Tensors:
        return {name: each for name, each in tensors.items() if name != "lm_head.weight"}

    file = save_text_encoder_file(tmp_path / "headless.safetensors", folder, *made, headless)
    refused(
        request_of(folder, [file], tmp_path),
        NotADiffusersPipelineError,
        r"headless.safetensors: it is not the model's text_encoder: 1 of \d+ tensors .*lm_head.weight: missing",
    )


def test_the_config_of_a_complete_clip_is_read(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    file = save_text_encoder_file(tmp_path / "clip_l.safetensors", folder, "text_encoder", "CLIP")
    complete = Path(shutil.copytree(folder, tmp_path / "complete"))
    config = transformers.CLIPConfig(text_config=json.loads((folder / "text_encoder" / "config.json").read_text()))
    config.save_pretrained(complete / "text_encoder")
    ours = open_request(request_of(complete, [file], tmp_path), lambda _: None)
    held(ours, open_checkpoint(str(folder)), {"text_encoder"}, as_it_is)


def by_its_second_name(tensors: Tensors) -> Tensors:
    return {"encoder.embed_tokens.weight" if name == "shared.weight" else name: each for name, each in tensors.items()}


@pytest.mark.parametrize("is_scaled", [False, True], ids=["t5xxl_fp8_e4m3fn", "t5xxl_fp8_e4m3fn_scaled"])
def test_fp8_becomes_bfloat16(is_scaled: bool, checkpoint_of: Folder, tmp_path: Path) -> None:
    scale = torch.tensor(0.01)

    def is_quantized(name: str) -> bool:
        return not is_scaled or name.endswith(("SelfAttention.q.weight", "wo.weight"))

    def quantize(tensors: Tensors) -> Tensors:
        stored: Tensors = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)} if is_scaled else {}
        for name, tensor in by_its_second_name(tensors).items():
            stored[name] = (
                (tensor / scale if is_scaled else tensor).to(torch.float8_e4m3fn) if is_quantized(name) else tensor
            )
            if is_scaled and is_quantized(name):
                stored[f"{name.removesuffix('weight')}scale_weight"] = scale
        return stored

    def expected(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_quantized(name):
            return tensor
        stored = (tensor / scale if is_scaled else tensor).to(torch.float8_e4m3fn).float()
        return (stored * scale if is_scaled else stored).bfloat16().float()

    folder = checkpoint_of("flux1-dev")
    file = save_text_encoder_file(tmp_path / "t5.safetensors", folder, "text_encoder_2", "T5", quantize)
    ours = open_request(request_of(folder, [file], tmp_path), lambda _: None)
    held(ours, open_checkpoint(str(folder)), {"text_encoder_2"}, expected)


# Of llama.cpp, and where the published name of each part begins.
GGUF_NAMES = {
    "T5": {
        "encoder.block.": "enc.blk.",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.0.SelfAttention.": "attn_",
        "layer.0.layer_norm": "attn_norm",
        "layer.1.layer_norm": "ffn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
        "encoder.final_layer_norm": "enc.output_norm",
        "shared": "token_embd",
    },
    "Qwen3": {
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj.": ".",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    },
}


@pytest.mark.parametrize(
    ("family", "module", "kind"), [("flux1-dev", "text_encoder_2", "T5"), ("z-image", "text_encoder", "Qwen3")]
)
def test_gguf_becomes_bfloat16(family: str, module: str, kind: str, checkpoint_of: Folder, tmp_path: Path) -> None:
    def is_quantized(tensor: torch.Tensor) -> bool:
        return tensor.ndim == 2 and tensor.shape[1] % 32 == 0

    def expected(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_quantized(tensor):
            return tensor
        blocks = gguf.quants.quantize(tensor.numpy(), Kind.Q8_0)
        return torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q8_0)).bfloat16().float()

    folder = checkpoint_of(family)
    writer = gguf.GGUFWriter(tmp_path / "text.gguf", kind)
    for name, tensor in text_encoder_tensors(folder, module, kind).items():
        short = functools.reduce(lambda text, pair: text.replace(*pair), GGUF_NAMES[kind].items(), name)
        if is_quantized(tensor):
            writer.add_tensor(short, gguf.quants.quantize(tensor.numpy(), Kind.Q8_0), raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(short, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_request(request_of(folder, [tmp_path / "text.gguf"], tmp_path), lambda _: None)
    held(ours, open_checkpoint(str(folder)), {module}, expected)


def test_clip_files_complete_a_unets_file_without_any_folder(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder", "sdxl")
    whole = save_single_file(tmp_path / "whole.safetensors", folder, "sdxl")
    kept = {name: each for name, each in load_file(whole).items() if name.startswith("model.")}
    # What the file lacks says how many numbers the UNet reads beside the pooled prompt: published ones read 6 * 256.
    embedding = "model.diffusion_model.label_emb.0.0.weight"
    kept[embedding] = torch.nn.functional.pad(kept[embedding], (0, 6 * (256 - 8)))
    save_file(kept, tmp_path / "unet.safetensors")
    files = [
        save_text_encoder_file(tmp_path / f"{name}.safetensors", folder, module, "CLIP")
        for name, module in (("clip_g", "text_encoder_2"), ("clip_l", "text_encoder"))
    ]
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    ours = open_request(request_of(tmp_path / "unet.safetensors", files, tmp_path, vae), lambda _: None)
    theirs = open_checkpoint(str(folder))
    held(ours, theirs, {"text_encoder", "text_encoder_2", "vae"}, as_it_is)
    configs = ["hidden_act", "num_attention_heads", "projection_dim", "eos_token_id", "layer_norm_eps"]
    for module in ("text_encoder", "text_encoder_2"):
        assert [ours.config(module)[name] for name in configs] == [theirs.config(module)[name] for name in configs]
    for file in (folder / "tokenizer_2").iterdir():
        assert (ours.folder_of("tokenizer_2") / file.name).read_bytes() == file.read_bytes()


def test_a_clip_file_as_transformers_saves_it_is_read_without_a_folder(tmp_path: Path) -> None:
    """Release 5 writes the names within the model, which earlier ones wrote with its level before them."""
    folder = save_folder(tmp_path / "folder", "sd-1")
    model = without_text_encoder(tmp_path / "unet.safetensors", folder, "sd-1")

    def bare(tensors: Tensors) -> Tensors:
        return {name.removeprefix("text_model."): each for name, each in tensors.items()}

    file = save_text_encoder_file(tmp_path / "clip_l.safetensors", folder, "text_encoder", "CLIP", bare)
    ours = open_request(request_of(model, [file], tmp_path), lambda _: None)
    held(ours, open_checkpoint(str(folder)), {"text_encoder"}, as_it_is)


def without_text_encoder(path: Path, folder: Path, kind: str) -> Path:
    """A folder of Stable Diffusion 1 or 2 as a single file that has no text encoder."""
    tensors = load_file(save_single_file(path, folder, kind))
    save_file({name: each for name, each in tensors.items() if not name.startswith("cond_stage_model.")}, path)
    return path


def test_the_last_layer_of_a_whole_clip_h_is_left_out(tmp_path: Path) -> None:
    """Stable Diffusion 2.x was trained with 23 of its 24, which is what diffusers' folder has."""
    folder = save_folder(tmp_path / "folder", "sd-2-base")
    config = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder", num_hidden_layers=23)
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")

    def whole(tensors: Tensors) -> Tensors:
        last = {name.replace(".22.", ".23."): each for name, each in tensors.items() if ".22." in name}
        assert last
        return tensors | last

    file = save_text_encoder_file(tmp_path / "clip_h.safetensors", folder, "text_encoder", "CLIP", whole)
    model = without_text_encoder(tmp_path / "unet.safetensors", folder, "sd-2-base")
    told: list[str] = []
    ours = open_request(request_of(model, [file], tmp_path), told.append)
    held(ours, open_checkpoint(str(folder)), {"text_encoder"}, as_it_is)
    assert told[-1] == (
        "left out 16 tensors that have no place in the text encoder, for example "
        "text_model.encoder.layers.23.layer_norm1.bias"
    )


def refused(request: ExportRequest, error: type[ExportError], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        open_request(request, lambda _: None)
    assert "\n" not in str(raised.value)


def test_what_is_missing_or_does_not_fit_is_one_line(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    clip = save_text_encoder_file(tmp_path / "clip_l.safetensors", folder, "text_encoder", "CLIP")
    t5 = save_text_encoder_file(tmp_path / "t5.safetensors", folder, "text_encoder_2", "T5")
    model = save_transformer_file(tmp_path / "flux.safetensors", folder, NAMES["flux1-dev"], "")
    base = without_weights(folder, tmp_path / "base")
    refused(
        request_of(model, [clip, t5], tmp_path),
        NotADiffusersPipelineError,
        "flux.safetensors: it is a transformer alone: pass the folder of its pipeline with --text-encoder; of parts "
        "that are given as files it needs the configs and tokenizers, not the weights",
    )
    refused(request_of(model, [base, clip], tmp_path), BrokenCheckpointError, "text_encoder_2: no weights")
    refused(
        request_of(model, [base, clip, Path(t5.rename(tmp_path / "clip_l.bin"))], tmp_path),
        BadOptionError,
        r"--text-encoder: .*clip_l.bin: give a .safetensors or .gguf file",
    )
    refused(request_of(folder, [base, folder], tmp_path), BadOptionError, "are two pipelines")
    refused(request_of(folder, [clip, clip], tmp_path), BadOptionError, "are both the model's text_encoder")
    save_file({name: each for name, each in load_file(clip).items() if "layers.1.mlp" not in name}, clip)
    refused(
        request_of(folder, [clip], tmp_path),
        NotADiffusersPipelineError,
        r"clip_l.safetensors: it is not the model's text_encoder: 4 of \d+ tensors are missing or of another shape",
    )
    refused(
        request_of(folder, [model], tmp_path),
        NotADiffusersPipelineError,
        r"flux.safetensors: it holds none of the model's text encoders \(text_encoder, text_encoder_2\)",
    )
    clip.write_bytes(b"x")
    refused(
        request_of(folder, [clip], tmp_path), BrokenCheckpointError, "clip_l.safetensors: the weights cannot be read"
    )


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (["kolors", "ChatGLMModel"], "its text_encoder is kolors.ChatGLMModel, which is not supported"),
        (["transformers", "NoSuchClass"], "its text_encoder is transformers.NoSuchClass, which is not supported"),
        (["a.b", "C"], "its text_encoder is a.b.C, which is not supported"),
        ([1, 2], "its text_encoder is 1.2, which is not supported"),
    ],
)
def test_a_text_encoder_of_another_class_is_not_imported(
    loader: list[object], words: str, checkpoint_of: Folder, tmp_path: Path
) -> None:
    folder = without_weights(checkpoint_of("flux1-dev"), tmp_path / "base")
    edit_json(folder / "model_index.json", text_encoder=loader)
    (tmp_path / "clip_l.safetensors").touch()
    refused(request_of(folder, [tmp_path / "clip_l.safetensors"], tmp_path), UnsupportedModelError, words)


def test_a_config_of_other_types_is_one_line(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = without_weights(checkpoint_of("flux1-dev"), tmp_path / "base")
    edit_json(folder / "text_encoder" / "config.json", hidden_size="wide")
    file = save_text_encoder_file(tmp_path / "t5.safetensors", checkpoint_of("flux1-dev"), "text_encoder_2", "T5")
    refused(
        request_of(folder, [file], tmp_path),
        BrokenCheckpointError,
        "text_encoder: its config does not fit CLIPTextModel",
    )


def test_a_pipeline_that_is_not_served_is_refused_before_a_file_is_read(checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = without_weights(checkpoint_of("flux1-dev"), tmp_path / "base")
    edit_json(folder / "model_index.json", _class_name="KolorsPipeline")
    (tmp_path / "clip_l.safetensors").touch()
    for model, given in ((folder, []), (tmp_path / "clip_l.safetensors", [folder])):
        request = request_of(model, [*given, tmp_path / "clip_l.safetensors"], tmp_path)
        refused(request, UnsupportedModelError, "base: KolorsPipeline is not supported")


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".bin", ".pt"])
def test_a_mistyped_file_is_said_to_be_none(suffix: str, checkpoint_of: Folder, tmp_path: Path) -> None:
    folder = checkpoint_of("flux1-dev")
    for name in (Path(f"files/clip_l{suffix}"), tmp_path / f"clip_l{suffix}"):
        refused(request_of(folder, [name], tmp_path), BadOptionError, f"^--text-encoder: {name}: no such file$")
        refused(request_of(folder, [], tmp_path, name), BadOptionError, f"^--vae: {name}: no such file$")


def test_a_gguf_for_a_unet_is_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "folder", "sd-1")
    model = without_text_encoder(tmp_path / "unet.safetensors", folder, "sd-1")
    (tmp_path / "clip.gguf").touch()
    refused(
        request_of(model, [tmp_path / "clip.gguf"], tmp_path),
        UnsupportedModelError,
        "clip.gguf: models with a UNet have CLIP, which is read from .safetensors alone",
    )
