"""A merged LoRA against the closed form, and against those who made its formats where they keep to it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.families.unet import STABLE_DIFFUSION_XL
from hypergen_export.checkpoints.layer_paths import flat
from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.lora_changes import read_changes
from hypergen_export.conversion.merging import merge_lora
from hypergen_export.errors import BadLoraError
from support.loras import TARGETS, Weights, lora_weights, save_by_diffusers, save_by_kohya, save_by_peft
from support.miniature import save_miniature
from support.pipelines import pipeline_of

from ..conftest import COMPONENTS

MODULES = ("unet", "text_encoder")
SCALE = 0.5
Layers = dict[str, Weights]
# Layer's path -> what is added to its weight at a scale of 1.
Deltas = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(checkpoint_folder: Path) -> Layers:
    return lora_weights(checkpoint_folder, *MODULES)


def merged(checkpoint: Checkpoint, name: str, file: Path) -> dict[str, torch.Tensor]:
    """The module's weights with the LoRA."""
    (component,) = (each for each in checkpoint.family.components if each.name == name)
    module = load_module(checkpoint, component)
    (lora,) = read_loras([f"{file}:{SCALE}"])
    merge_lora(name, module, lora)
    return module.state_dict()


def held(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """The same numbers under the same names, and others than without the LoRA."""
    assert ours.keys() == theirs.keys() == base.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(ours[name], base[name]) for name in ours) >= 10


def held_to_closed_form(checkpoint: Checkpoint, name: str, file: Path, deltas: Deltas) -> None:
    """W + scale · delta for each of the layers, and nothing else changed."""
    (component,) = (each for each in checkpoint.family.components if each.name == name)
    base = load_module(checkpoint, component).state_dict()
    ours = merged(checkpoint, name, file)
    changed = {path.removesuffix(".weight") for path in ours if not torch.equal(ours[path], base[path])}
    assert changed == {path for path, delta in deltas.items() if delta.any()}
    for path, delta in deltas.items():
        expected = base[f"{path}.weight"] + SCALE * delta.reshape(base[f"{path}.weight"].shape)
        torch.testing.assert_close(ours[f"{path}.weight"], expected, rtol=1e-6, atol=1e-6)


def pairs(layers: Weights) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer's path -> down and up, of weights by peft's names."""
    paths = sorted({name.partition(".lora_")[0] for name in layers})
    return {path: (layers[f"{path}.lora_A.weight"], layers[f"{path}.lora_B.weight"]) for path in paths}


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))


def kohya_name(name: str, path: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[name]
    return prefix + path.removeprefix("text_model.").replace(".", "_")


def kohya_pair(layer: str, down: torch.Tensor, up: torch.Tensor) -> Weights:
    return {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}


def by_diffusers(folder: Path, weights: Layers) -> Path:
    return save_by_diffusers(folder / "diffusers", weights)


def by_diffusers_with_alpha(folder: Path, weights: Layers) -> Path:
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS["unet"]}
    return save_by_diffusers(folder / "alpha", {"unet": weights["unet"]}, **config)


def by_kohya(folder: Path, weights: Layers) -> Path:
    return save_by_kohya(folder / "kohya.safetensors", weights, alpha=2.0)


@pytest.mark.parametrize("save", [by_diffusers, by_diffusers_with_alpha, by_kohya])
def test_merging_equals_load_lora_weights_and_fuse_lora(
    save: Callable[[Path, Layers], Path],
    weights: Layers,
    checkpoint: Checkpoint,
    checkpoint_folder: Path,
    tmp_path: Path,
) -> None:
    file = save(tmp_path, weights)
    pipeline = pipeline_of(checkpoint_folder)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    for name in read_loras([str(file)])[0].modules:
        base = load_module(checkpoint, COMPONENTS[name]).state_dict()
        held(merged(checkpoint, name, file), getattr(pipeline, name).state_dict(), base)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_each_layer_of_kohyas_has_its_own_alpha_and_rank(
    dtype: torch.dtype, name: str, weights: Layers, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As resized, extracted and block-weighted ones have them; where none is stated, alpha is the rank."""
    stored: Weights = {}
    deltas = {}
    for number, (path, (down, up)) in enumerate(pairs(weights[name]).items()):
        rank = 1 + number % 4
        alpha = [None, torch.tensor(0.5 * number), torch.tensor([2.0]), torch.tensor(1), torch.tensor(0.0)][number % 5]
        down, up = down[:rank].to(dtype), up[:, :rank].to(dtype)
        layer = kohya_name(name, path)
        stored |= kohya_pair(layer, down.contiguous(), up.contiguous())
        stored |= {} if alpha is None else {f"{layer}.alpha": alpha}
        factor = 1.0 if alpha is None else alpha.item() / rank
        deltas[path] = factor * product(down.float(), up.float())
    save_file(stored, tmp_path / "kohya.safetensors")
    held_to_closed_form(checkpoint, name, tmp_path / "kohya.safetensors", deltas)


def test_a_file_for_another_model_says_for_which(checkpoint: Checkpoint, tmp_path: Path) -> None:
    stored = {"lora_unet_out_9.lora_down.weight": random(4, 8), "lora_unet_out_9.lora_up.weight": random(8, 4)}
    save_file(stored, tmp_path / "xl.safetensors", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(BadLoraError, match="the file says that it is for sdxl_base"):
        merged(checkpoint, "unet", tmp_path / "xl.safetensors")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def hadamard(shape: torch.Size) -> tuple[Weights, torch.Tensor]:
    """A LoHa of rank 3, and its change by LyCORIS's formula."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    parts = {f"hada_w{n}_a": random(outputs, 3) * n for n in (1, 2)}
    parts |= {f"hada_w{n}_b": random(3, inputs) + n for n in (1, 2)}
    change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return {**parts, "alpha": torch.tensor(1.5)}, 0.5 * change


def kronecker(shape: torch.Size) -> tuple[Weights, torch.Tensor]:
    """A LoKr with a decomposed second factor of rank 3."""
    outputs, inputs, *kernel = shape
    parts = {"lokr_w1": random(4, 2), "lokr_w2_a": random(outputs // 4, 3)}
    parts["lokr_w2_b"] = random(3, inputs // 2 * math.prod(kernel))
    second = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(outputs // 4, inputs // 2, *kernel)
    first = parts["lokr_w1"].reshape(4, 2, *[1] * len(kernel))
    return {**parts, "alpha": torch.tensor(1.5)}, 0.5 * torch.kron(first, second)


def whole_kronecker(shape: torch.Size) -> tuple[Weights, torch.Tensor]:
    """A LoKr of two whole factors, whose alpha LyCORIS ignores."""
    outputs, inputs, *kernel = shape
    parts = {"lokr_w1": random(4, 2), "lokr_w2": random(outputs // 4, inputs // 2, *kernel)}
    first = parts["lokr_w1"].reshape(4, 2, *[1] * len(kernel))
    return {**parts, "alpha": torch.tensor(1.5)}, torch.kron(first, parts["lokr_w2"])


@pytest.mark.parametrize(("product_of", "rank"), [(hadamard, 9), (kronecker, 6), (whole_kronecker, None)])
def test_products_of_lycoris_are_sums_of_rows_times_columns(
    product_of: Callable[[torch.Size], tuple[Weights, torch.Tensor]],
    rank: int | None,
    weights: Layers,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    base = load_module(checkpoint, COMPONENTS["unet"]).state_dict()
    stored: Weights = {}
    deltas: Weights = {}
    for path in pairs(weights["unet"]):
        parts, deltas[path] = product_of(base[f"{path}.weight"].shape)
        stored |= {f"{kohya_name('unet', path)}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(stored, tmp_path / "lycoris.safetensors")
    held_to_closed_form(checkpoint, "unet", tmp_path / "lycoris.safetensors", deltas)
    (lora,) = read_loras([str(tmp_path / "lycoris.safetensors")])
    assert rank is None or lora.rank == rank
    names: dict[str, dict[str, list[list[int]]]] = {flat(path): {path: []} for path in deltas}
    for path, change in read_changes("unet", "UNet2DConditionModel", lora, names).items():
        assert len(change.factors(base[f"{path}.weight"].shape)[0]) <= lora.rank


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "ending",
    ["lora_{}.weight", "lora_{}.default.weight", "lora_{}.default_0.weight", "lora.{}.weight"],
    ids=["peft", "default", "default_0", "diffusers"],
)
def test_an_adapters_name_in_the_weights_names_is_left_out(
    ending: str, name: str, weights: Layers, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first, second = ("down", "up") if ending == "lora.{}.weight" else ("A", "B")
    stored: Weights = {}
    for path, (down, up) in pairs(weights[name]).items():
        stored[f"{name}.{path}.{ending.format(first)}"] = down
        stored[f"{name}.{path}.{ending.format(second)}"] = up
    save_file(stored, tmp_path / "peft.safetensors")
    deltas = {path: product(*pair) for path, pair in pairs(weights[name]).items()}
    held_to_closed_form(checkpoint, name, tmp_path / "peft.safetensors", deltas)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_attention_processors_are_read_with_and_without_the_unets_name(
    prefix: str, weights: Layers, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As diffusers' `save_attn_procs` wrote them."""
    attention = {path: pair for path, pair in pairs(weights["unet"]).items() if ".to_" in path}
    stored: Weights = {}
    for path, (down, up) in attention.items():
        layer, _, projection = path.removesuffix(".0").rpartition(".")
        name = f"{prefix}{layer}.processor.{projection}_lora"
        stored |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(stored, tmp_path / "processors.safetensors")
    deltas = {path: product(*pair) for path, pair in attention.items()}
    held_to_closed_form(checkpoint, "unet", tmp_path / "processors.safetensors", deltas)


@pytest.mark.parametrize("ending", [".lora_linear_layer", "former"])
def test_a_text_encoders_layers_are_read_by_their_former_names(
    ending: str, weights: Layers, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    stored: Weights = {}
    deltas = {}
    for path, (down, up) in pairs(weights["text_encoder"]).items():
        if "self_attn" not in path:
            continue
        layer, _, projection = path.rpartition(".")
        former = f"{layer}.to_{projection.removesuffix('_proj')}_lora"
        name = f"text_encoder.text_model.{former if ending == 'former' else path + ending}"
        stored |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        deltas[path] = product(down, up)
    save_file(stored, tmp_path / "former.safetensors")
    held_to_closed_form(checkpoint, "text_encoder", tmp_path / "former.safetensors", deltas)


def test_xls_layers_are_read_by_their_authors_names_too(tmp_path: Path) -> None:
    """One flat list of blocks on the way down, and one on the way up: kohya's, OneTrainer's and ComfyUI's names."""
    checkpoint = open_checkpoint(str(save_miniature(tmp_path / "xl", family="sdxl")))
    names = {
        "input_blocks_0_0": "conv_in",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "input_blocks_3_1_transformer_blocks_1_attn2_to_out_0": (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"
        ),
        "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
        ),
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_0_1_proj_out": "up_blocks.0.attentions.0.proj_out",
        "output_blocks_1_1_transformer_blocks_0_attn1_to_q": (
            "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
        ),
        "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_0_in_layers_2": "up_blocks.1.resnets.1.conv1",
        "out_2": "conv_out",
    }
    (component,) = (each for each in STABLE_DIFFUSION_XL if each.name == "unet")
    base = load_module(checkpoint, component).state_dict()
    generator = torch.Generator().manual_seed(1)
    stored: Weights = {}
    deltas = {}
    for number, (name, path) in enumerate(names.items()):
        shape = base[f"{path}.weight"].shape
        down = torch.randn((3, *shape[1:]), generator=generator)
        up = torch.randn((shape[0], 3, *[1] * (len(shape) - 2)), generator=generator)
        dotted = re.sub(r"_(?=\d)|(?<=\d)_", ".", name)
        layer = (f"lora_unet_{name}", f"unet.{dotted}", f"diffusion_model.{dotted}")[number % 3]
        stored |= {**kohya_pair(layer, down, up), f"{layer}.alpha": torch.tensor(float(number + 1))}
        deltas[path] = (number + 1) / 3 * product(down, up)
    save_file(stored, tmp_path / "xl.safetensors")
    held_to_closed_form(checkpoint, "unet", tmp_path / "xl.safetensors", deltas)


def test_a_convolution_may_be_factored_into_three(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """LoCon with CP: the three convolutions one after the other."""
    generator = torch.Generator().manual_seed(1)
    path = "down_blocks.0.resnets.0.conv1"
    down, mid, up = (torch.randn(shape, generator=generator) for shape in [(4, 16, 1, 1), (4, 4, 3, 3), (16, 4, 1, 1)])
    layer = f"lora_unet_{path.replace('.', '_')}"
    names = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{layer}.{name}": tensor for name, tensor in names.items()}, tmp_path / "locon.safetensors")
    # What the convolutions make of each input channel's single pixel is the kernel, turned round.
    pixel = torch.zeros(16, 16, 5, 5)
    pixel[range(16), range(16), 2, 2] = 1.0
    convolve = torch.nn.functional.conv2d
    kernel = convolve(convolve(convolve(pixel, down), mid), up).flip(2, 3).transpose(0, 1)
    held_to_closed_form(checkpoint, "unet", tmp_path / "locon.safetensors", {path: 2.0 / 4 * kernel})


def test_a_linear_layer_may_be_stored_as_a_convolution_and_the_other_way_round(
    weights: Layers, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    stored: Weights = {}
    deltas = {}
    for path, (down, up) in pairs(weights["unet"]).items():
        if ".to_" in path:
            layer = f"lora_unet_{path.replace('.', '_')}"
            stored |= {
                f"{layer}.lora_down.weight": down[..., None, None],
                f"{layer}.lora_up.weight": up[..., None, None],
            }
            deltas[path] = product(down, up)
    path = "mid_block.attentions.0.proj_in"  # 1×1, as 1.x has it
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    stored |= {
        f"lora_unet_mid_block_attentions_0_proj_in.lora_{name}.weight": one
        for name, one in (("down", down), ("up", up))
    }
    deltas[path] = product(down, up)
    save_file(stored, tmp_path / "x.safetensors")
    held_to_closed_form(checkpoint, "unet", tmp_path / "x.safetensors", deltas)


PEFT_SETTINGS = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_q": 3, "conv1": 5}},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("settings", PEFT_SETTINGS.values(), ids=PEFT_SETTINGS.keys())
def test_merging_what_peft_alone_wrote_equals_its_own(
    settings: dict[str, Any], checkpoint: Checkpoint, checkpoint_folder: Path, tmp_path: Path
) -> None:
    folder = save_by_peft(tmp_path / "peft", checkpoint_folder, alpha=8, **settings)
    module: Any = load_module(checkpoint, COMPONENTS["unet"])
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    theirs: Any = PeftModel.from_pretrained(module, str(folder))
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(SCALE)
    held(merged(checkpoint, "unet", folder), theirs.merge_and_unload().state_dict(), base)


def test_a_bias_is_added_too(checkpoint: Checkpoint, checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = save_by_peft(tmp_path / "peft", checkpoint_folder, alpha=8, lora_bias=True, target_modules=["conv1"])
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: torch.full_like(one, 0.5) if name.endswith("bias") else one for name, one in load_file(file).items()
    }
    save_file(tensors, file)
    base = load_module(checkpoint, COMPONENTS["unet"]).state_dict()
    ours = merged(checkpoint, "unet", folder)
    changed = [name for name in ours if name.endswith("bias") and not torch.equal(ours[name], base[name])]
    assert changed == [name for name in base if name.endswith("conv1.bias")]
    for name in changed:
        torch.testing.assert_close(ours[name], base[name] + SCALE * 8 / 4 * 0.5)


def test_biases_of_zero_leave_the_rest_of_the_lora_as_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = "down_blocks.0.resnets.0.conv1"
    down, up = torch.ones(4, 16, 3, 3), torch.ones(16, 4, 1, 1)
    names = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": torch.zeros(16)}
    save_file({f"unet.{path}.{name}": tensor for name, tensor in names.items()}, tmp_path / "x.safetensors")
    held_to_closed_form(checkpoint, "unet", tmp_path / "x.safetensors", {path: product(down, up)})


def wider(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, torch.cat([tensor, tensor], dim=1) if "lora_A" in name else tensor


def for_other_layers(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name.replace(".", ".deep_", 1), tensor


def for_more_layers(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name.replace("up_blocks.1", "up_blocks.2").replace("layers.1", "layers.2"), tensor


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (wider, r"the weights' shapes differ at [\w.]+"),
        (for_other_layers, r"it has none of its layers, for example [\w.]+"),
        (for_more_layers, r"it lacks \d+ of \d+ layers, for example [\w.]+"),
    ],
)
def test_a_lora_of_another_architecture_is_refused_in_one_line(
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]],
    problem: str,
    name: str,
    weights: Layers,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    file = save_by_diffusers(tmp_path, {name: dict(change(*item) for item in weights[name].items())})
    with pytest.raises(BadLoraError, match=rf"^{file}: does not fit this model's {name} \({problem}\)$"):
        merged(checkpoint, name, file)


def test_xls_lora_does_not_fit_an_older_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    xl = save_miniature(tmp_path / "xl", family="sdxl")
    file = save_by_diffusers(tmp_path / "lora", lora_weights(xl, "unet"))
    with pytest.raises(BadLoraError, match="does not fit this model's unet"):
        merged(checkpoint, "unet", file)


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = torch.ones(2, 32), torch.ones(32, 2)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({f"{Q}.lora_A.weight": DOWN}, "to_q has no up"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "to_q has no down and no up"),
        (
            {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP * math.nan},
            r"the weights are not finite \(.*to_q.lora_B.weight\)",
        ),
        ({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP * 0}, "has no effect: its weights are zero"),
        ({f"{Q}.lora_A.weight": DOWN[:0], f"{Q}.lora_B.weight": UP[:, :0]}, "has no effect"),
        ({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": torch.ones(32, 3)}, "shapes differ"),
        (
            {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, f"{Q}.alpha": torch.ones(2)},
            "shapes differ",
        ),
        (
            {
                f"{Q}.lora_{pair}.{adapter}.weight": one + len(adapter)
                for adapter in ("one", "other")
                for pair, one in (("A", DOWN), ("B", UP))
            },
            "contains more than one LoRA",
        ),
        (
            {
                f"{name}.lora_{pair}.weight": one.clone()
                for name in (Q, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
                for pair, one in ((("A"), DOWN), (("B"), UP))
            },
            "one layer under two names",
        ),
    ],
)
def test_a_lora_that_cannot_be_merged_is_rejected_in_one_line(
    tensors: Weights, problem: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(BadLoraError, match=problem) as caught:
        merged(checkpoint, "unet", tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (None, "adapter_config.json: peft's settings cannot be read"),
        ({"peft_type": "LOHA"}, "not the settings of a LoRA"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "was trained on a base model that peft changed"),
    ],
)
def test_pefts_settings_are_needed_and_must_be_those_of_a_lora(
    settings: dict[str, Any] | None, problem: str, checkpoint: Checkpoint, checkpoint_folder: Path, tmp_path: Path
) -> None:
    folder = save_by_peft(tmp_path / "peft", checkpoint_folder, alpha=8)
    (folder / "adapter_config.json").unlink()
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadLoraError, match=problem):
        merged(checkpoint, "unet", folder)
