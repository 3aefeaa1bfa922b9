"""Quantized transformers in one file, against gguf's own dequantization and the product of fp8 weights and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import AutoencoderTiny
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from hypergen_export.errors import BrokenCheckpointError, NotADiffusersPipelineError, UnsupportedModelError
from hypergen_export.repository.opening import open_request
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.single_file import SingleFileOptions
from hypergen_export.single_files import quantized
from hypergen_export.single_files.kinds import UNET
from hypergen_export.single_files.quantized import bytes_to_write, dequantized
from hypergen_export.single_files.vae import convert_vae
from support.single_files import save_folder, save_single_file
from support.single_text_encoders import save_text_encoder_file
from support.single_transformers import NAMES, save_transformer_file

Folder = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
FLUX = "flux1-dev"
BLOCK = 32


@pytest.fixture
def original(checkpoint_of: Folder, tmp_path: Path) -> Tensors:
    return load_file(save_transformer_file(tmp_path / "original.safetensors", checkpoint_of(FLUX), NAMES[FLUX], ""))


def request_of(file: Path, base: Path | None, place: Path) -> ExportRequest:
    options = SingleFileOptions(cache_dir=place / f"cache-{file.name}")
    text_encoders = () if base is None else (str(base),)
    return ExportRequest(model=str(file), output=place / "out", single_files=options, text_encoders=text_encoders)


def converted(file: Path, base: Path, place: Path) -> Tensors:
    """The transformer that a file becomes, by diffusers' names; nothing else is left in the cache."""
    folder = open_request(request_of(file, base, place), lambda text: pytest.fail(text)).folder_of("transformer")
    assert {each.name for each in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "single_file.json",
    }
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def held(file: Path, expected: Tensors, base: Path, place: Path) -> None:
    """The file becomes what a plain file with the expected values becomes, to the bit."""
    save_file(expected, place / "plain.safetensors")
    ours, theirs = converted(file, base, place), converted(place / "plain.safetensors", base, place)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, Kind.BF16])
def test_gguf_files_have_the_values_of_ggufs_own_dequantization(
    kind: Kind, original: Tensors, checkpoint_of: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_SLICE", 256)
    file, expected = tmp_path / "flux.gguf", dict[str, torch.Tensor]()
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in original.items():
        values = tensor.float().numpy()
        if tensor.ndim < 2 or tensor.shape[-1] % BLOCK:
            writer.add_tensor(name, values)
            expected[name] = tensor.float()
            continue
        blocks = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).bfloat16()
    write(writer)
    held(file, expected, checkpoint_of(FLUX), tmp_path)
    assert bytes_to_write(file) == space_of(expected)


def space_of(expected: Tensors) -> int:
    """The bytes of a conversion: dequantized tensors are for a while there twice."""
    return sum(each.nbytes * (2 if each.dtype == torch.bfloat16 else 1) for each in expected.values())


def test_a_unet_alone_in_gguf_has_the_values_of_ggufs_own_dequantization(tmp_path: Path) -> None:
    """As ComfyUI-GGUF's tools write it: without the prefix, and convolutions as rows with their shape beside them."""
    folder = save_folder(tmp_path / "folder", "sd-1")
    whole = load_file(save_single_file(tmp_path / "whole.safetensors", folder, "sd-1"))
    writer = gguf.GGUFWriter(tmp_path / "unet.gguf", "sd1")
    for name, tensor in list(whole.items()):
        if not name.startswith(UNET):
            continue
        bare = name.removeprefix(UNET)
        if tensor.ndim < 2 or tensor.numel() % BLOCK:
            writer.add_tensor(bare, tensor.numpy())
            continue
        blocks = gguf.quants.quantize(tensor.reshape(-1, BLOCK).numpy(), Kind.Q8_0)
        writer.add_tensor(bare, blocks, raw_dtype=Kind.Q8_0)
        writer.add_array(f"comfy.gguf.orig_shape.{bare}", list(tensor.shape))
        whole[name] = torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q8_0)).bfloat16().reshape(tensor.shape)
    write(writer)
    save_file(whole, tmp_path / "plain.safetensors")
    clip = save_text_encoder_file(tmp_path / "clip_l.safetensors", folder, "text_encoder", "CLIP")
    ours, theirs = (
        load_file(open_request(request, lambda _: None).folder_of("unet") / "diffusion_pytorch_model.safetensors")
        for request in (
            replace(request_of(tmp_path / "unet.gguf", clip, tmp_path), vae=str(folder)),
            request_of(tmp_path / "plain.safetensors", None, tmp_path),
        )
    )
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def test_k_quants_and_shapes_of_more_axes_are_read(tmp_path: Path) -> None:
    """The package only reads K-quants, so their blocks are random; ComfyUI-GGUF states shapes beside the tensors."""
    file = tmp_path / "x.gguf"
    blocks = torch.randint(0, 100, (8, 144), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).numpy()
    writer = gguf.GGUFWriter(file, "flux")
    writer.add_tensor("a", blocks, raw_dtype=Kind.Q4_K)
    writer.add_array("comfy.gguf.orig_shape.a", [2, 4, 1, 16, 16])
    write(writer)
    reports: list[float] = []
    with dequantized(file, tmp_path, reports.append) as (read, _):
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q4_K)).bfloat16().reshape(2, 4, 1, 16, 16)
        assert torch.equal(read.tensors["a"], expected)
    assert reports == [0.5]
    assert [each.name for each in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_that_is_refused_is_not_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "write_sources", lambda *_: pytest.fail("dequantized"))
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", torch.zeros(8, 34).byte().numpy(), raw_dtype=Kind.Q8_0)
    write(writer)
    request = request_of(tmp_path / "flux.gguf", None, tmp_path)
    with pytest.raises(NotADiffusersPipelineError, match="pass the folder of its pipeline with --text-encoder"):
        open_request(request, lambda _: None)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("is_former", [True, False], ids=["scaled_fp8", "comfy_quant"])
def test_scaled_fp8_is_weights_times_scale(
    is_former: bool, original: Tensors, checkpoint_of: Folder, tmp_path: Path
) -> None:
    file, stored, expected = tmp_path / "flux.safetensors", dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    if is_former:
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    for name, tensor in original.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim < 2 or "blocks" not in name:
            stored[name] = expected[name] = tensor.float()
            continue
        # In one file a scale for all rows, in the other one for each.
        scale = (tensor.abs().amax() if is_former else tensor.abs().amax(dim=1, keepdim=True)).float() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.{'scale_weight' if is_former else 'weight_scale'}"] = scale
        stored[f"{layer}.{'scale_input' if is_former else 'input_scale'}"] = torch.ones(1)
        if not is_former:
            stated = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(stated), dtype=torch.uint8)
        expected[name] = (stored[name].float() * scale).bfloat16()
    save_file(stored, file)
    held(file, expected, checkpoint_of(FLUX), tmp_path)
    assert bytes_to_write(file) == space_of(expected)


NVFP4 = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"a.qweight": torch.ones(1, dtype=torch.int8)}, r"quantized by nunchaku \(SVDQuant\) \(a\.qweight\)"),
        ({"a.weight.absmax": torch.ones(1)}, r"quantized by bitsandbytes \(a\.weight\.absmax\)"),
        ({"a.weight_scale_2": torch.ones(1)}, r"quantized to nvfp4 \(a\.weight_scale_2\)"),
        ({"a.comfy_quant": NVFP4}, r"quantized to nvfp4 \(a\.comfy_quant\)"),
        (
            {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(3)},
            r"the scale of a\.weight is of another kind",
        ),
        (
            {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1, 2)},
            r"the scale of a\.weight is of another kind",
        ),
        (
            {"a.weight": torch.ones(0, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
            r"the scale of a\.weight is of another kind",
        ),
    ],
)
def test_what_is_not_read_is_one_line(stored: Tensors, words: str, checkpoint_of: Folder, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(stored, file)
    request = request_of(file, checkpoint_of(FLUX), tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"x\.safetensors: .*{words}") as raised:
        open_request(request, lambda _: None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"<html>"])
def test_a_broken_gguf_file_is_one_line(content: bytes, checkpoint_of: Folder, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    request = request_of(tmp_path / "x.gguf", checkpoint_of(FLUX), tmp_path)
    with pytest.raises(BrokenCheckpointError, match=r"x\.gguf: the GGUF file cannot be read") as raised:
        open_request(request, lambda _: None)
    assert "\n" not in str(raised.value)


def test_a_comfy_quant_without_end_is_one_line(checkpoint_of: Folder, tmp_path: Path) -> None:
    stored = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    save_file(
        stored | {"a.comfy_quant": torch.full((200_000,), ord("["), dtype=torch.uint8)}, tmp_path / "x.safetensors"
    )
    request = request_of(tmp_path / "x.safetensors", checkpoint_of(FLUX), tmp_path)
    with pytest.raises(BrokenCheckpointError, match=r"a\.comfy_quant cannot be read"):
        open_request(request, lambda _: None)


@pytest.mark.parametrize(
    ("tensor", "shape"), [(torch.ones(4, 4).numpy(), [-4, -4]), (torch.ones(0, 34).byte().numpy(), None)]
)
def test_gguf_tensors_of_no_shape_are_one_line(
    tensor: Any, shape: list[int] | None, checkpoint_of: Folder, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_tensor("a", tensor, raw_dtype=None if shape else Kind.Q8_0)
    if shape:
        writer.add_array("comfy.gguf.orig_shape.a", shape)
    write(writer)
    with pytest.raises(BrokenCheckpointError, match=r"x\.gguf: a has \d+ values, but its shape is"):
        open_request(request_of(tmp_path / "x.gguf", checkpoint_of(FLUX), tmp_path), lambda _: None)


def test_a_vae_in_scaled_fp8_is_weights_times_scale(tmp_path: Path) -> None:
    vae, scale = AutoencoderTiny().state_dict(), torch.tensor(0.5)
    name = "encoder.layers.0.weight"
    stored = {**vae, name: (vae[name] / scale).to(torch.float8_e4m3fn), "encoder.layers.0.scale_weight": scale}
    save_file(stored, tmp_path / "vae.safetensors")
    (tmp_path / "out").mkdir()
    convert_vae(tmp_path / "vae.safetensors", tmp_path / "out", {}, lambda _: None)
    read = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(read[name].float(), (stored[name].float() * scale), rtol=0, atol=0)
