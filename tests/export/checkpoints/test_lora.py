"""What `--lora` may say, and what a file's header tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypergen_export.checkpoints.families import FAMILIES
from hypergen_export.checkpoints.lora import Lora, read_loras
from hypergen_export.errors import BadLoraError, BadOptionError

POINTER = b"version https://git-lfs.github.com/spec/v1\n"
ANY = "unet.mid_block.attentions.0.proj_in.lora_A.weight"


def save(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, file)
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "Ink wash, v2.safetensors", ANY)


def read_one(text: object) -> Lora:
    (lora,) = read_loras([str(text)])
    return lora


@pytest.mark.parametrize(
    ("text", "name", "scale"),
    [
        ("ink={}", "ink", 1.0),
        ("ink={}:0.5", "ink", 0.5),
        ("a.b_c-D9={}:2", "a.b_c-D9", 2.0),
        ("{}", "Ink-wash-v2", 1.0),
        ("{}:.25", "Ink-wash-v2", 0.25),
    ],
)
def test_a_lora_has_a_name_a_file_and_a_scale(text: str, name: str, scale: float, file: Path) -> None:
    assert read_one(text.format(file)) == Lora(name=name, file=file, scale=scale)


def test_the_lora_that_ships_with_the_project_has_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = read_one("hypergen/badge:0.8")
    assert (shipped.name, shipped.scale, shipped.modules) == ("badge", 0.8, frozenset({"unet"}))
    assert shipped.file.stat().st_size < 1_000_000
    monkeypatch.chdir(tmp_path)
    own = save(tmp_path / "hypergen" / "badge" / "x.safetensors", ANY)
    assert read_one("hypergen/badge").file == own.relative_to(tmp_path), "what is there comes first"
    with pytest.raises(BadLoraError, match="hypergen/other: no such LoRA file or folder"):
        read_one("hypergen/other")


def test_one_name_may_have_several_scales(file: Path) -> None:
    loras = read_loras([f"ink={file}:0.5", f"ink={file}"])
    assert [lora.label for lora in loras] == ["ink@0.5", "ink@1"]


def test_a_path_may_hold_a_colon_and_an_equals_sign(tmp_path: Path) -> None:
    file = save(tmp_path / "a=b:c" / "d.safetensors", ANY)
    assert read_one(file) == Lora(name="d", file=file)
    assert read_one(f"ink={file}:0.5") == Lora(name="ink", file=file, scale=0.5)


@pytest.mark.parametrize("ending", ["", ":0.5"])
def test_a_file_of_that_very_name_comes_before_a_name_and_a_path(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "ink=v2.safetensors", ANY)
    scale = 0.5 if ending else 1.0
    assert read_one(f"ink=v2.safetensors{ending}") == Lora(name="ink-v2", file=Path("ink=v2.safetensors"), scale=scale)
    save(tmp_path / "v2.safetensors", ANY)
    assert read_one(f"new=v2.safetensors{ending}") == Lora(name="new", file=Path("v2.safetensors"), scale=scale)


@pytest.mark.parametrize("usual", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "any.safetensors"])
def test_a_folder_stands_for_its_lora(tmp_path: Path, usual: str) -> None:
    file = save(tmp_path / "ink" / usual, ANY)
    assert read_one(tmp_path / "ink") == Lora(name="ink", file=file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ink wash={}", "a name must have 1 to 64 letters, digits, '_', '.' or '-', not 'ink wash'"),
        ("={}", "a name must have 1 to 64"),
        ("ink@2={}", "a name must have 1 to 64"),
        (f"{'x' * 65}={{}}", "a name must have 1 to 64"),
        ("ink={}:0", "a scale must be above 0 and at most 2, not 0"),
        ("ink={}:2.1", "a scale must be above 0"),
        ("ink={}:-1", "a scale must be above 0"),
        ("ink={}:nan", "a scale must be above 0"),
    ],
)
def test_an_illegal_name_or_scale_is_refused(text: str, problem: str, file: Path) -> None:
    with pytest.raises(BadOptionError, match=problem):
        read_loras([text.format(file)])


def test_a_name_and_scale_are_given_once_and_for_one_file(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOptionError, match=r"ink at scale 0\.5 is given twice"):
        read_loras([f"ink={file}:0.5", f"ink={file}:0.50"])
    other = save(tmp_path / "other.safetensors", ANY)
    with pytest.raises(BadOptionError, match="ink is the name of two files"):
        read_loras([f"ink={file}:0.5", f"ink={other}"])


def test_a_missing_file_and_an_ambiguous_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadLoraError, match="no such LoRA file or folder"):
        read_loras([f"ink={tmp_path / 'nowhere.safetensors'}"])
    with pytest.raises(BadLoraError, match=r"has no \.safetensors files"):
        read_loras([str(tmp_path)])
    save(tmp_path / "one.safetensors", ANY)
    save(tmp_path / "two.safetensors", ANY)
    with pytest.raises(BadLoraError, match=r"has 2 \.safetensors files"):
        read_loras([str(tmp_path)])


@pytest.mark.parametrize(
    ("weights", "modules"),
    [
        ([ANY, "text_encoder.x.lora_A.weight", "text_encoder_2.x.lora_B.weight"], "unet text_encoder text_encoder_2"),
        (["lora_unet_out_2.lora_down.weight", "lora_unet_conv_in.alpha", "lora_te_x.alpha"], "unet text_encoder"),
        (["lora_te1_x.lora_up.weight", "lora_te2_x.lora_up.weight"], "text_encoder text_encoder_2"),
        (["base_model.model.mid_block.x.lora_A.weight"], "unet"),
        (
            ["unet.input_blocks.4.1.x.lora_up.weight", "clip_l.x.alpha", "clip_g.x.alpha"],
            "unet text_encoder text_encoder_2",
        ),
        (
            [
                "diffusion_model.output_blocks.1.x.lora_up.weight",
                *(f"text_encoders.clip_{kind}.transformer.text_model.x.lora_up.weight" for kind in "lg"),
            ],
            "unet text_encoder text_encoder_2",
        ),
        (["text_encoders.clip_h.transformer.text_model.x.lora_up.weight"], "text_encoder"),
        # One way to name a transformer's layers each: diffusers, AI-Toolkit and ComfyUI, kohya's scripts and
        # musubi-tuner, OneTrainer, LyCORIS, peft alone, Qwen-Image-Lightning, XLabs.
        (["transformer.x.lora_A.weight"], "transformer"),
        (["diffusion_model.layers.0.attention.to_q.lora_A.weight"], "transformer"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_te1_x.alpha"], "transformer text_encoder"),
        (["lora_transformer_proj_out.alpha"], "transformer"),
        (["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"], "transformer"),
        (["base_model.model.double_blocks.0.img_mod.lin.lora_A.weight"], "transformer"),
        (["transformer_blocks.0.attn.to_k.lora_down.weight"], "transformer"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "transformer"),
        # A T5 has another place in FLUX.1 than in Stable Diffusion 3, and OneTrainer counts differently.
        (["lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"], "T5"),
        (["lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"], "T5"),
        (["text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo.lora_A.weight"], "T5"),
    ],
)
def test_the_names_of_the_weights_tell_what_it_changes(weights: list[str], modules: str, tmp_path: Path) -> None:
    assert read_one(save(tmp_path / "x.safetensors", *weights)).modules == set(modules.split())


@pytest.mark.parametrize(
    ("family", "module"),
    [("flux1-dev", "text_encoder_2"), ("stable-diffusion-3", "text_encoder_3"), ("z-image", "T5")],
)
def test_a_t5_is_the_text_encoder_that_the_family_has_of_that_kind(family: str, module: str, tmp_path: Path) -> None:
    (served,) = (each for each in FAMILIES if each.name == family)
    file = save(tmp_path / "x.safetensors", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight")
    assert replace(read_one(file), t5=served.t5).modules == {module}


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (["unet.conv_in.weight"], "not a LoRA: it contains unet.conv_in.weight"),
        (
            ["text_encoders.gemma2.x.lora_A.weight"],
            "is not of a UNet, transformer or text encoder of the kinds that are",
        ),
        (["lora_prior_unet_x.lora_down.weight"], "is not of a UNet, transformer or text encoder"),
        ([], "has no weights"),
    ],
)
def test_a_file_that_is_not_a_lora_for_this_kind_of_model_is_rejected(
    weights: list[str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(BadLoraError, match=problem):
        _ = read_one(save(tmp_path / "x.safetensors", *weights)).modules


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ("lora_unet_x.hada_t1", "a LoHa"),
        ("base_model.model.x.hada_w2_b.default", "a LoHa"),
        ("lora_unet_x.lokr_w1_a", "a LoKr"),
        ("base_model.model.x.lokr_w2_b.default", "a LoKr"),
        ("lora_unet_x.lokr_t2", "a LoKr"),
        ("lora_unet_x.oft_blocks", "an OFT"),
        ("lora_unet_x.oft_diag", "an OFT"),
        ("base_model.model.x.oft_R.weight", "an OFT"),
        ("lora_unet_x.a1.weight", "a GLoRA"),
        ("lora_unet_x.bm2.weight", "a GLoRA"),
        ("lora_unet_x.on_input", "an IA3"),
        ("base_model.model.x.ia3_l", "an IA3"),
        ("base_model.model.vera_lambda_b", "a VeRA"),
        ("base_model.model.x.vera_lambda_b", "a VeRA"),
        ("lora_unet_x.w_norm", "changes norms"),
        ("lora_unet_x.b_norm", "changes norms"),
        ("lora_unet_x.diff", "full differences"),
        ("lora_unet_x.diff_b", "full differences"),
        ("lora_unet_x.dora_scale", "a DoRA of kohya's format"),
        ("base_model.model.x.lora_embedding_A", "token embeddings"),
        ("lora_controlnet", "a ControlNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
        ("emb_params", "a textual inversion"),
        ("clip_g", "a textual inversion"),
    ],
)
def test_another_kind_of_file_is_named_even_where_it_stands_beside_a_lora(
    weight: str, kind: str, tmp_path: Path
) -> None:
    file = save(tmp_path / "x.safetensors", "lora_unet_y.lora_down.weight", "lora_unet_y.lora_up.weight", weight)
    with pytest.raises(BadLoraError, match=rf"^{file}: is .*{kind}.*, which is not supported \(it contains {weight}\)"):
        _ = read_one(file).modules


@pytest.mark.parametrize(
    ("weight", "layer", "part"),
    [
        ("lora_unet_mid_block_x.lora_mid.weight", "mid_block_x", "mid"),
        ("lora_unet_mid_block_x.alpha", "mid_block_x", "alpha"),
        ("unet.mid_block.x.lora_A.default.weight", "mid_block.x", "down"),
        ("unet.mid_block.x.lora_B.weight", "mid_block.x", "up"),
        ("unet.mid_block.x.lora_B.bias", "mid_block.x", "bias"),
        ("unet.mid_block.x.lora_magnitude_vector", "mid_block.x", "magnitude"),
        ("unet.mid_block.x.lora_magnitude_vector.weight", "mid_block.x", "magnitude"),
        ("unet.mid_block.x.lora_magnitude_vector.default.weight", "mid_block.x", "magnitude"),
        ("unet.mid_block.x.lora.up.weight", "mid_block.x", "up"),
        ("unet.mid_block.x.processor.to_out_lora.up.weight", "mid_block.x.to_out", "up"),
        ("mid_block.x.processor.to_q_lora.down.weight", "mid_block.x.to_q", "down"),
        ("base_model.model.mid_block.x.lora_A.weight", "mid_block.x", "down"),
    ],
)
def test_a_weights_name_tells_its_layer_and_what_it_is_to_it(
    weight: str, layer: str, part: str, tmp_path: Path
) -> None:
    assert read_one(save(tmp_path / "x.safetensors", weight)).layers("unet") == {layer: {part: weight}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a zip archive",
        (2**62).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[1]x",
        POINTER,
    ],
)
def test_a_file_of_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadLoraError, match="not a safetensors file"):
        _ = read_one(tmp_path / "x.safetensors").modules


def test_its_hash_follows_the_file_and_pefts_settings_beside_it(tmp_path: Path) -> None:
    file = save(tmp_path / "adapter_model.safetensors", "base_model.model.x.lora_A.weight")
    hashes = [read_one(file).sha256]
    for alpha in (8, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        hashes.append(read_one(file).sha256)
    save(file, "base_model.model.y.lora_A.weight")
    hashes.append(read_one(file).sha256)
    assert len(set(hashes)) == 4
