"""Text encoders that several families have."""

from __future__ import annotations

from dataclasses import replace

from hypergen_export.checkpoints.components import FLOAT, WEIGHTS_ONLY, Component, Sizes, Tensor
from hypergen_export.checkpoints.families.tensors import HIDDEN_STATES, POOLED, TOLERANCE, attention_mask, input_ids
from hypergen_export.checkpoints.family import Config, Configs

QWEN2_TOKENIZER = "transformers.Qwen2Tokenizer"
T5_TOKENIZER = "transformers.T5Tokenizer"
GEMMA_TOKENIZER = "transformers.GemmaTokenizer"
# The pipelines load a Qwen3 with or without its language modelling head, which is not used.
QWEN3, QWEN3_WITH_HEAD = "transformers.Qwen3Model", "transformers.Qwen3ForCausalLM"


# More than any published Qwen3 has.
_MOST_LAYERS = 200


def qwen3(tokens: str, wrapper: str, layers: int = _MOST_LAYERS) -> Component:
    """Qwen3, whose padding is masked; `tokens` is the axis of the prompt's tokens, `layers` how many are used."""
    return Component(
        name="text_encoder",
        module="text_encoder",
        loader=QWEN3,
        wrapper=wrapper,
        inputs=(input_ids(tokens, "prompt"), attention_mask(tokens)),
        outputs=(Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=(tokens, "context_width")),),
        tolerance=TOLERANCE,
        unused=("lm_head.", *(f"layers.{number}." for number in range(layers, _MOST_LAYERS))),
        is_typed=True,
        kept_layers={"layers": (0, 1, 2, 3)},  # so many that FLUX.2's indices, modulo their number, are three layers
        quantized=WEIGHTS_ONLY,
    )


def clip_pooled(tokens: str) -> Component:
    """CLIP, of which only the pooled output is used; `tokens` is the axis of its tokens."""
    return Component(
        name="text_encoder",
        module="text_encoder",
        loader="transformers.CLIPTextModel",
        wrapper="clip_pooled",
        inputs=(input_ids(tokens, "prompt"),),
        outputs=(POOLED,),
        tolerance=TOLERANCE,
    )


def clip_tokens(configs: Configs, tokenizer: str, text_encoder: Config) -> int:
    """Prompt length in tokens: the tokenizer's, limited to the positions of the text encoder."""
    positions = int(text_encoder["max_position_embeddings"])
    return min(configs.tokenizer_length(tokenizer) or positions, positions)


def t5(name: str, tokens: str, example: str, *, masked: bool = False) -> Component:
    """The encoder of a T5; `tokens` is the axis of the prompt's tokens. `masked`: it does not attend to padding."""
    return Component(
        name=name,
        module=name,
        loader="transformers.T5EncoderModel",
        wrapper="t5",
        inputs=(input_ids(tokens, example), *((attention_mask(tokens),) if masked else ())),
        outputs=(replace(HIDDEN_STATES, axes=(tokens, "context_width")),),
        tolerance=TOLERANCE,
        # transformers clamps its activations in float16, and diffusers' documentation advises float32 for it.
        overflows_float16=True,
        is_typed=True,
        kept_layers={"block": (0, -1)},
        quantized=WEIGHTS_ONLY,
    )


def unread_features(denoiser: str, read: object, sizes: Sizes) -> str:
    """Why a denoiser that reads so many features per token is not one for its checkpoint's text encoders."""
    return f"its {denoiser} reads {read} features per token, its text encoders give {sizes['context_width']}"
