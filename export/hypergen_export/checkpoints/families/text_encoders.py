"""Text encoders that several families have."""

from __future__ import annotations

from hypergen_export.checkpoints.components import FLOAT, Component, Tensor
from hypergen_export.checkpoints.families.tensors import TOLERANCE, attention_mask, input_ids

QWEN2_TOKENIZER = "transformers.Qwen2Tokenizer"
# The pipelines load a Qwen3 with or without its language modelling head, which is not used.
QWEN3, QWEN3_WITH_HEAD = "transformers.Qwen3Model", "transformers.Qwen3ForCausalLM"


def qwen3(tokens: str, wrapper: str) -> Component:
    """Qwen3, whose padding is masked; `tokens` is the axis of the prompt's tokens."""
    return Component(
        name="text_encoder",
        module="text_encoder",
        loader=QWEN3,
        wrapper=wrapper,
        inputs=(input_ids(tokens, "prompt"), attention_mask(tokens)),
        outputs=(Tensor(name="encoder_hidden_states", dtype=FLOAT, axes=(tokens, "context_width")),),
        tolerance=TOLERANCE,
    )
