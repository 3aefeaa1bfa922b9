"""A text encoder in one file: CLIP, T5, Qwen3 or Qwen2.5-VL by transformers' names, as ComfyUI distributes them.

T5 and Qwen3 are read from GGUF files, too, by llama.cpp's names.
Which of a model's text encoders a file holds is said by the names and shapes of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypergen_export.errors import NotADiffusersPipelineError
from hypergen_export.single_files.configs import bare_name
from hypergen_export.single_files.folder import check_precisions, named, write_modules
from hypergen_export.single_files.kinds import Shapes, T, TextEncoder
from hypergen_export.single_files.modules import Module, expected_shapes
from hypergen_export.single_files.quantized import dequantized
from hypergen_export.single_files.reading import Tensors

_EMBEDDINGS, _SECOND_NAME = "shared.weight", "encoder.embed_tokens.weight"  # of T5
# llama.cpp's names in GGUF files -> those of published checkpoints.
_GGUF_T5 = {
    r"token_embd\.": "shared.",
    r"enc\.output_norm\.": "encoder.final_layer_norm.",
    r"enc\.blk\.(\d+)\.attn_(q|k|v|o)\.": r"encoder.block.\1.layer.0.SelfAttention.\2.",
    r"enc\.blk\.(\d+)\.attn_rel_b\.": r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    r"enc\.blk\.(\d+)\.attn_norm\.": r"encoder.block.\1.layer.0.layer_norm.",
    r"enc\.blk\.(\d+)\.ffn_gate\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.",
    r"enc\.blk\.(\d+)\.ffn_up\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.",
    r"enc\.blk\.(\d+)\.ffn_down\.": r"encoder.block.\1.layer.1.DenseReluDense.wo.",
    r"enc\.blk\.(\d+)\.ffn_norm\.": r"encoder.block.\1.layer.1.layer_norm.",
}
_GGUF_QWEN3 = {
    r"token_embd\.": "model.embed_tokens.",
    r"output_norm\.": "model.norm.",
    r"output\.": "lm_head.",
    r"blk\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"blk\.(\d+)\.ffn_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"blk\.(\d+)\.attn_(q|k|v)\.": r"model.layers.\1.self_attn.\2_proj.",
    r"blk\.(\d+)\.attn_output\.": r"model.layers.\1.self_attn.o_proj.",
    r"blk\.(\d+)\.attn_(q|k)_norm\.": r"model.layers.\1.self_attn.\2_norm.",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.": r"model.layers.\1.mlp.\2_proj.",
}
# Tensors of published files that no pipeline calls.
_UNUSED = re.compile(r"(.*\.)?(logit_scale|position_ids|text_projection\.weight|lm_head\.weight|spiece_model)")


@dataclass(frozen=True, kw_only=True)
class ConvertedTextEncoder:
    """Which module of the model a file has become, and notices about it, one line each."""

    module: str
    notices: tuple[str, ...]


def convert_text_encoder(
    path: Path, folder: Path, encoders: Mapping[str, TextEncoder], report: Callable[[float], None]
) -> ConvertedTextEncoder:
    """Write the config and weights of the text encoder that the file holds to `folder`.

    `encoders` are those of the model, by their modules' names. Raises ExportError, OSError.
    """
    expected = {name: _expected(name, each) for name, each in encoders.items()}

    def find(shapes: Shapes) -> str:
        return _find({bare_name(name): shape for name, shape in _published(shapes).items()}, expected)

    with named(path), dequantized(path, folder, report, find) as (file, rest):
        tensors, name = _published(file.tensors), find(file.shapes)
        check_precisions(tensors)
        own = {key: tensor for key, tensor in tensors.items() if bare_name(key) in expected[name]}
        found = encoders[name]
        module = Module(name=name, loader=found.loader, config=dict(found.config), tensors=own)
        write_modules({folder: module}, rest)
    return ConvertedTextEncoder(module=name, notices=tuple(_notices(tensors, own)))


def _expected(module: str, encoder: TextEncoder) -> Shapes:
    with named(Path(module)):
        return expected_shapes(encoder.loader, encoder.config)


def _published(given: Mapping[str, T]) -> dict[str, T]:
    """The same by the names of published checkpoints, which all releases of transformers read."""
    is_t5 = any(name.startswith("enc.blk.") for name in given)
    patterns = _GGUF_T5 if is_t5 else _GGUF_QWEN3 if "token_embd.weight" in given else {}
    if _EMBEDDINGS not in given:
        patterns = {**patterns, re.escape(_SECOND_NAME): _EMBEDDINGS}
    return {_renamed(name, patterns): each for name, each in given.items()}


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    match = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
    return name if match is None else match.expand(patterns[match.re.pattern]) + name[match.end() :]


def _find(given: Shapes, expected: Mapping[str, Shapes]) -> str:
    """The module whose tensors are all given. Raises NotADiffusersPipelineError, without the file's name."""
    lacking = {
        module: [name for name, shape in tensors.items() if given.get(name) != shape]
        for module, tensors in expected.items()
    }
    nearest = min(lacking, key=lambda module: len(lacking[module]) / len(expected[module]))
    if not lacking[nearest]:
        return nearest
    if len(lacking[nearest]) == len(expected[nearest]):
        raise NotADiffusersPipelineError(
            f"it holds none of the model's text encoders ({', '.join(expected)}); its first tensor is "
            f"{next(iter(given), None)}"
        )
    example = lacking[nearest][0]
    shapes = f"{given.get(example, 'missing')} instead of {expected[nearest][example]}"
    raise NotADiffusersPipelineError(
        f"it is not the model's {nearest}: {len(lacking[nearest])} of {len(expected[nearest])} tensors are missing or "
        f"of another shape, for example {example}: {shapes}"
    )


def _notices(tensors: Tensors, own: Tensors) -> Iterator[str]:
    left = sorted(name for name in tensors if name not in own and not _UNUSED.fullmatch(name))
    if left:
        yield f"left out {len(left)} tensors that have no place in the text encoder, for example {left[0]}"
