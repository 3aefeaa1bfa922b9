"""Layers of transformers by the names of trainers: against diffusers' conversions, of checkpoints and of LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.checkpoints.lora import Lora
from hypergen_export.conversion.layer_names import has_matrix, layer_names
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.lora_changes import Change, read_changes
from hypergen_export.conversion.merging import merge_lora
from hypergen_export.errors import BadLoraError
from hypergen_export.single_files.modules import NoCopies
from support.single_transformers import NAMES, save_transformer_file

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 3.0
Write = Callable[[Mapping[str, tuple[torch.Tensor, torch.Tensor]]], Tensors]


@pytest.fixture(scope="module")
def transformer_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], torch.nn.Module]:
    def load(family: str) -> torch.nn.Module:
        checkpoint = open_checkpoint(str(checkpoint_of(family)))
        return load_module(checkpoint, checkpoint.family.denoiser)

    return load


def kohya(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    """kohya's sd-scripts and musubi-tuner."""
    stored: Tensors = {}
    for path, (down, up) in layers.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        stored |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return stored


def comfyui(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    """AI-Toolkit, and what others write for ComfyUI."""
    stored: Tensors = {}
    for path, (down, up) in layers.items():
        name = f"diffusion_model.{path}"
        stored |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return stored


def bare(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    """Qwen-Image-Lightning."""
    stored: Tensors = {}
    for path, (down, up) in layers.items():
        stored |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up, f"{path}.alpha": torch.tensor(ALPHA)}
    return stored


def random_pairs(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> down and up."""
    generator = torch.Generator().manual_seed(2)
    return {
        path: (torch.randn(RANK, *rest, generator=generator), torch.randn(outputs, RANK, generator=generator))
        for path, (outputs, *rest) in shapes.items()
    }


def deltas_of(module: torch.nn.Module, file: Path) -> Tensors:
    """What the file adds to the weight of each layer, as we read it."""
    lora, kind = Lora(name="x", file=file), type(module).__name__
    changes = read_changes("transformer", kind, lora, layer_names(module))
    return {path: delta_of(change, module.get_submodule(path)) for path, change in changes.items()}


def delta_of(change: Change, layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.get_parameter("weight")
    down, up = change.factors(weight.shape)
    return (up @ down.flatten(1)).reshape(weight.shape)


def held(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        torch.testing.assert_close(delta, theirs[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [kohya, comfyui])
@pytest.mark.parametrize("family", ["flux1-dev", "chroma", "flux2-klein", "stable-diffusion-3", "z-image"])
def test_original_names_mean_what_a_checkpoint_by_those_names_means(
    family: str, write: Write, checkpoint_of: Callable[[str], Path], transformer_of: Any, tmp_path: Path
) -> None:
    """Every layer of a single file with a LoRA of its own, which diffusers converts as if it were the weight."""
    module = transformer_of(family)
    original = load_file(save_transformer_file(tmp_path / "file", checkpoint_of(family), NAMES[family], ""))
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in original.items()
        if name.endswith(".weight") and tensor.dim() > 1
    }
    pairs = random_pairs(shapes)
    save_file(write(pairs), tmp_path / "lora.safetensors")
    factor = ALPHA / RANK if write is kohya else 1.0
    weights = {
        f"{path}.weight": factor * (up @ down.flatten(1)).reshape(shapes[path]) for path, (down, up) in pairs.items()
    }
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[type(module).__name__]["checkpoint_mapping_fn"]
    with NoCopies():
        converted = convert(checkpoint=original | weights, config=dict(module.config))
    layers = [path for path, layer in module.named_modules() if has_matrix(layer)]
    held(deltas_of(module, tmp_path / "lora.safetensors"), {path: converted[f"{path}.weight"] for path in layers})


def onetrainer(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    return {name.replace("lora_unet_", "lora_transformer_"): tensor for name, tensor in kohya(layers).items()}


def xlabs(layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    stored: Tensors = {}
    for path, (down, up) in layers.items():
        stored |= {f"{path}.down.weight": down, f"{path}.up.weight": up}
    return stored


_DOUBLE = {
    "double_blocks.0.img_attn.qkv": (768, 256),
    "double_blocks.0.txt_attn.qkv": (768, 256),
    "double_blocks.0.img_attn.proj": (256, 256),
    "double_blocks.0.txt_attn.proj": (256, 256),
}
_XLABS = {
    "double_blocks.0.processor.qkv_lora1": (768, 256),
    "double_blocks.0.processor.qkv_lora2": (768, 256),
    "double_blocks.0.processor.proj_lora1": (256, 256),
    "double_blocks.0.processor.proj_lora2": (256, 256),
    "single_blocks.1.processor.qkv_lora": (768, 256),
}
_Z_IMAGE = {
    "layers.1.attention.to_q": (256, 256),
    "noise_refiner.0.attention.to_out.0": (256, 256),
    "layers.0.adaLN_modulation.0": (1024, 256),
    "context_refiner.0.attention.to_v": (256, 256),
}
_Z_IMAGE_ORIGINAL = {"layers.1.attention.qkv": (768, 256), "layers.0.attention.out": (256, 256)}
_QWEN = {
    "transformer_blocks.0.attn.add_q_proj": (256, 256),
    "transformer_blocks.1.attn.to_out.0": (256, 256),
    "transformer_blocks.1.img_mod.1": (1536, 256),
    "transformer_blocks.0.txt_mlp.net.0.proj": (1024, 256),
}
_SINGLE_2 = {"single_blocks.0.linear1": (2304, 256), "single_blocks.1.linear2": (256, 1024)}
# Flux's converters of LoRAs have the widths of the published models, so of its single blocks some are left out.
BY_DIFFUSERS = [
    ("flux1-dev", diffusers.FluxPipeline, kohya, _DOUBLE),
    ("flux1-dev", diffusers.FluxPipeline, onetrainer, {"transformer_blocks.0.attn.to_k": (256, 256)}),
    ("flux1-dev", diffusers.FluxPipeline, xlabs, _XLABS),
    ("chroma", diffusers.ChromaPipeline, kohya, _DOUBLE),
    ("flux2-klein", diffusers.Flux2KleinPipeline, kohya, _DOUBLE | _SINGLE_2),
    ("flux2-klein", diffusers.Flux2KleinPipeline, comfyui, _DOUBLE | _SINGLE_2),
    ("z-image", diffusers.ZImagePipeline, kohya, _Z_IMAGE),
    ("z-image", diffusers.ZImagePipeline, kohya, _Z_IMAGE_ORIGINAL),
    ("z-image", diffusers.ZImagePipeline, comfyui, _Z_IMAGE),
    ("qwen-image", diffusers.QwenImagePipeline, kohya, _QWEN),
    ("qwen-image", diffusers.QwenImagePipeline, comfyui, _QWEN),
    ("qwen-image", diffusers.QwenImagePipeline, bare, _QWEN),
]


@pytest.mark.parametrize(("family", "pipeline", "write", "shapes"), BY_DIFFUSERS)
def test_a_trainers_file_means_what_diffusers_reads_in_it(
    family: str, pipeline: Any, write: Write, shapes: Mapping[str, Any], transformer_of: Any, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(write(random_pairs(shapes)), file)
    read = pipeline.lora_state_dict(load_file(file))
    paths = {name.removeprefix("transformer.").partition(".lora_")[0] for name in read}
    theirs = {
        path: read[f"transformer.{path}.lora_B.weight"] @ read[f"transformer.{path}.lora_A.weight"] for path in paths
    }
    held(deltas_of(transformer_of(family), file), theirs)


def test_a_kronecker_product_of_several_layers_is_split_like_them(transformer_of: Any, tmp_path: Path) -> None:
    first, second = torch.randn(6, 4), torch.randn(128, 64)
    name = "diffusion_model.layers.0.attention.qkv"
    save_file({f"{name}.lokr_w1": first, f"{name}.lokr_w2": second}, tmp_path / "lokr.safetensors")
    parts = torch.kron(first, second).chunk(3)
    expected = {f"layers.0.attention.to_{part}": delta for part, delta in zip("qkv", parts, strict=True)}
    held(deltas_of(transformer_of("z-image"), tmp_path / "lokr.safetensors"), expected)


def test_norms_and_biases_of_several_layers_are_split_like_them(transformer_of: Any, tmp_path: Path) -> None:
    """A DoRA of FLUX.1's queries, keys and values, merged as one layer by peft's formula."""
    module = transformer_of("flux1-dev")
    layers = [module.get_submodule(f"transformer_blocks.0.attn.to_{part}") for part in "qkv"]
    weight, bias = (torch.cat([layer.get_parameter(name) for layer in layers]) for name in ("weight", "bias"))
    (down, up), norms, added = random_pairs({"x": weight.shape})["x"], torch.rand(768) + 0.5, torch.randn(768)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    stored = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": norms, "lora_B.bias": added}
    save_file({f"{name}.{part}": tensor for part, tensor in stored.items()}, tmp_path / "dora.safetensors")
    changed = weight + 0.5 * up @ down
    changed = changed * (norms / changed.norm(dim=1))[:, None]
    expected = zip(changed.chunk(3), (bias + 0.5 * added).chunk(3), strict=True)
    merge_lora("transformer", module, Lora(name="x", file=tmp_path / "dora.safetensors", scale=0.5))
    for layer, (its_weight, its_bias) in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.get_parameter("weight"), its_weight)
        torch.testing.assert_close(layer.get_parameter("bias"), its_bias)


def test_one_layer_by_its_own_name_and_in_a_larger_one_is_refused(transformer_of: Any, tmp_path: Path) -> None:
    shapes = {"layers.0.attention.qkv": (768, 256), "layers.0.attention.to_k": (256, 256)}
    save_file(comfyui(random_pairs(shapes)), tmp_path / "x.safetensors")
    with pytest.raises(BadLoraError, match="one layer under two names"):
        deltas_of(transformer_of("z-image"), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("layer", "base"),
    [
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "Stable Diffusion 3"),
        ("lora_unet_double_blocks_0_img_mod_lin", "FLUX.1"),
        ("transformer.single_transformer_blocks.0.norm.linear", "FLUX.1"),
        ("transformer.single_transformer_blocks.0.proj_mlp", "FLUX.1 or Chroma"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "FLUX.2"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX.1, Chroma or FLUX.2"),
        ("transformer.transformer_blocks.9.img_mod.1", "Qwen-Image"),
        ("transformer.transformer_blocks.0.ff.conv_inverted", "Sana"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_unet_txt_in_individual_token_refiner_blocks_0_mlp_0", "HunyuanVideo"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", "Chroma"),
    ],
)
def test_a_file_for_another_base_says_for_which(layer: str, base: str, transformer_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}, file)
    with pytest.raises(BadLoraError) as refused:
        deltas_of(transformer_of("z-image"), file)
    (path,) = Lora(name="x", file=file).layers("transformer")
    reason = f"it has none of its layers, for example {path}; its layers are those of {base}"
    assert str(refused.value) == f"{file}: does not fit this model's transformer ({reason})"


@pytest.mark.parametrize(
    ("stated", "fits"),
    [
        ("flux-1-dev/lora", "flux1-dev"),
        ("flux1", "flux1-dev"),
        ("chroma/lora", "chroma"),
        ("Flux.2-klein-4b", "flux2-klein"),
        ("stable-diffusion-3.5-medium/lora", "stable-diffusion-3"),
        ("sd3m", "stable-diffusion-3"),
        ("Qwen-Image/lora", "qwen-image"),
        ("qwen_image", "qwen-image"),
    ],
)
def test_a_file_that_fits_is_refused_if_it_says_that_it_is_for_another_base(
    stated: str, fits: str, transformer_of: Any, tmp_path: Path
) -> None:
    """Attention of double blocks has the same names, and at full size mostly the same shapes, in all of these."""
    width = {"stable-diffusion-3": 128}.get(fits, 256)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    file, unstated = (tmp_path / f"{name}.safetensors" for name in ("stated", "unstated"))
    save_file(weights, file, metadata={"modelspec.architecture": stated})
    save_file(weights, unstated)
    for family in ("flux1-dev", "chroma", "flux2-klein", "stable-diffusion-3", "qwen-image"):
        module = transformer_of(family)
        if family == fits:
            assert deltas_of(module, file).keys() == deltas_of(module, unstated).keys() != set()
            continue
        reason = f"it is for another kind of model; the file says that it is for {stated}"
        with pytest.raises(BadLoraError) as refused:
            deltas_of(module, file)
        assert str(refused.value) == f"{file}: does not fit this model's transformer ({reason})"


@pytest.mark.parametrize(("width", "base"), [(768, "1"), (1024, "2"), (2048, "XL")])
def test_a_unets_file_says_of_which_kind(width: int, base: str, tmp_path: Path) -> None:
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, width)}, tmp_path / "x.safetensors")
    made_for = Lora(name="x", file=tmp_path / "x.safetensors").made_for
    assert made_for == f"; its layers are those of Stable Diffusion {base}"
