"""Names of transformers' layers in their original implementations, flattened: trainers of LoRAs use them, too.

One of those layers may be several of diffusers' one after another, such as query, key and value. Where diffusers has
shift and scale the other way round (`AdaLayerNormContinuous`), the two halves change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

# Of a layer in a file, the rows (first, end) that one of the module's layers has; empty if that is the whole layer.
Rows = Sequence[Sequence[int]]
# Flattened name, "{}" for a block's number -> the paths of its rows in a module of diffusers.
_Table = Mapping[str, tuple[str, ...]]

_STREAMS = {
    "img": ("to_q", "to_k", "to_v", "to_out.0"),
    "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}


def original_names(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Rows]]:
    """Name of an original layer -> path of each of the module's layers in it -> its rows; empty for other modules.

    `layers` are the module's layers by path.
    """
    names = {}
    for name, paths in _numbered(_TABLES.get(type(module).__name__, {}), module):
        if all(path in layers for path in paths):
            names[name] = _rows(module, {path: layers[path] for path in paths})
    return names


def _numbered(table: _Table, module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The table's entries for each block."""
    blocks = max((len(child) for child in module.children() if isinstance(child, nn.ModuleList)), default=0)
    for name, paths in table.items():
        for number in range(blocks if "{}" in name else 1):
            yield name.format(number), [path.format(number) for path in paths]


def _rows(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Rows]:
    rows: dict[str, Rows] = {}
    first = 0
    for path, layer in layers.items():
        end = first + len(layer.get_parameter("weight"))
        middle = (first + end) // 2
        is_turned_round = type(module.get_submodule(path.rpartition(".")[0])).__name__ == "AdaLayerNormContinuous"
        rows[path] = [[middle, end], [first, middle]] if is_turned_round else [[first, end]]
        first = end
    return rows


def _attention(stream: str) -> tuple[tuple[str, ...], str]:
    """Paths of query, key and value, and of the output projection, of a stream of FLUX's."""
    *qkv, output = (f"transformer_blocks.{{}}.attn.{name}" for name in _STREAMS[stream])
    return tuple(qkv), output


def _flux(feed_forward: tuple[str, str]) -> _Table:
    """What FLUX.1 and FLUX.2 have in common."""
    table: dict[str, tuple[str, ...]] = {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer_linear": ("proj_out",),
        "final_layer_adaLN_modulation_1": ("norm_out.linear",),
    }
    for stream, name in (("img", "ff"), ("txt", "ff_context")):
        qkv, output = _attention(stream)
        block = f"double_blocks_{{}}_{stream}"
        table |= {f"{block}_attn_qkv": qkv, f"{block}_attn_proj": (output,)}
        for number, layer in zip((0, 2), feed_forward, strict=True):
            table[f"{block}_mlp_{number}"] = (f"transformer_blocks.{{}}.{name}.{layer}",)
    return table


def _embedders(parent: str, names: Mapping[str, str], layers: tuple[str, str]) -> _Table:
    """Embedders of two layers: their names -> those of diffusers, in the module `parent`."""
    return {
        f"{name}_{layer}": (f"{parent}.{own}.linear_{number}",)
        for name, own in names.items()
        for number, layer in enumerate(layers, start=1)
    }


_SINGLE = "single_transformer_blocks.{}"
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_IN_AND_OUT = ("in_layer", "out_layer")

_FLUX_1: _Table = {
    **_flux(("net.0.proj", "net.2")),
    **_embedders(
        "time_text_embed",
        {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"},
        _IN_AND_OUT,
    ),
    "double_blocks_{}_img_mod_lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks_{}_txt_mod_lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks_{}_linear1": (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp"),
    "single_blocks_{}_linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks_{}_modulation_lin": (f"{_SINGLE}.norm.linear",),
    # XLabs'
    "double_blocks_{}_processor_qkv_lora1": _attention("img")[0],
    "double_blocks_{}_processor_qkv_lora2": _attention("txt")[0],
    "double_blocks_{}_processor_proj_lora1": (_attention("img")[1],),
    "double_blocks_{}_processor_proj_lora2": (_attention("txt")[1],),
    "single_blocks_{}_processor_qkv_lora": _SINGLE_QKV,
    "single_blocks_{}_processor_proj_lora": (f"{_SINGLE}.proj_out",),
}
# It has fewer layers than FLUX.1, as one network computes what modulates all of them.
_CHROMA: _Table = {
    **_FLUX_1,
    "distilled_guidance_layer_layers_{}_in_layer": ("distilled_guidance_layer.layers.{}.linear_1",),
    "distilled_guidance_layer_layers_{}_out_layer": ("distilled_guidance_layer.layers.{}.linear_2",),
}
_FLUX_2: _Table = {
    **_flux(("linear_in", "linear_out")),
    **_embedders(
        "time_guidance_embed", {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}, _IN_AND_OUT
    ),
    "single_blocks_{}_linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks_{}_linear2": (f"{_SINGLE}.attn.to_out",),
    "single_stream_modulation_lin": ("single_stream_modulation.linear",),
    "double_stream_modulation_img_lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt_lin": ("double_stream_modulation_txt.linear",),
}


def _stable_diffusion_3() -> _Table:
    block = "transformer_blocks.{}"
    table: dict[str, tuple[str, ...]] = {
        "x_embedder_proj": ("pos_embed.proj",),
        "final_layer_linear": ("proj_out",),
        "final_layer_adaLN_modulation_1": ("norm_out.linear",),
        "joint_blocks_{}_x_block_attn2_qkv": tuple(f"{block}.attn2.{name}" for name in ("to_q", "to_k", "to_v")),
        "joint_blocks_{}_x_block_attn2_proj": (f"{block}.attn2.to_out.0",),
    }
    for stream, original, feed_forward, norm in (
        ("img", "x_block", "ff", "norm1"),
        ("txt", "context_block", "ff_context", "norm1_context"),
    ):
        qkv, output = _attention(stream)
        name = f"joint_blocks_{{}}_{original}"
        table |= {
            f"{name}_attn_qkv": qkv,
            f"{name}_attn_proj": (output,),
            f"{name}_mlp_fc1": (f"{block}.{feed_forward}.net.0.proj",),
            f"{name}_mlp_fc2": (f"{block}.{feed_forward}.net.2",),
            f"{name}_adaLN_modulation_1": (f"{block}.{norm}.linear",),
        }
    embedders = {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}
    return {**table, **_embedders("time_text_embed", embedders, ("mlp_0", "mlp_2"))}


def _z_image() -> _Table:
    table: dict[str, tuple[str, ...]] = {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer_linear": ("all_final_layer.2-1.linear",),
        "final_layer_adaLN_modulation_1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    for blocks in ("layers", "noise_refiner", "context_refiner"):
        attention = f"{blocks}.{{}}.attention"
        table[f"{blocks}_{{}}_attention_qkv"] = tuple(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v"))
        table[f"{blocks}_{{}}_attention_out"] = (f"{attention}.to_out.0",)
    return table


# Qwen-Image's original names are diffusers' own.
_TABLES: Mapping[str, _Table] = {
    "FluxTransformer2DModel": _FLUX_1,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX_2,
    "SD3Transformer2DModel": _stable_diffusion_3(),
    "ZImageTransformer2DModel": _z_image(),
}
