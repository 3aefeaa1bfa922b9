"""Write a tokenizer as one `tokenizers` file with its padding and truncation, so serving needs no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import LoraPool
from hypergen_export.checkpoints.defaults import text_padding
from hypergen_export.checkpoints.family import TextInput
from hypergen_export.errors import BadEmbeddingError, BrokenCheckpointError, ParityMissedError, first_line

# Empty, short, too long, not ASCII, and with case, whitespace and special tokens.
_PROBES = (
    "",
    "a rocket on a yellow background",
    "An  ASTRONAUT's café, 1924!\n",
    "日本語 \U0001f680 naïve",
    "word " * 600,
    "<|startoftext|> twice <|endoftext|>",
    "  <|im_start|>user\ntwice<|im_end|> </s>\n",
)
# A character of the private use area, which no chat template contains.
_SENTINEL = "\ue000"


def write_tokenizer(checkpoint: Checkpoint, text: TextInput, path: Path) -> None:
    """Write a `tokenizers` file whose encodings are the ids that diffusers feeds the text encoder.

    It encodes prompts with the text of `template_of` around them.

    Raises:
        BrokenCheckpointError: the tokenizer's files cannot be read.
        ParityMissedError: the file would encode a prompt differently.
    """
    length = checkpoint.sizes[text.tokens]
    theirs = _load(checkpoint, text)
    _check_vocabulary(theirs, checkpoint.folder_of(text.tokenizer), _vocabulary_size(checkpoint, text))
    _add_embeddings(theirs, checkpoint, text)
    ours = _with_padding(theirs, length)
    before, after = template_of(checkpoint, text)
    for prompt in _PROBES:
        expected = theirs(_as_given(theirs, text, prompt), padding="max_length", max_length=length, truncation=True)
        if ours.encode(f"{before}{prompt}{after}").ids != expected.input_ids:
            raise ParityMissedError(f"{text.tokenizer}: encodes {prompt[:40]!r} differently than transformers")
    if text.is_instruction and len(theirs(before).input_ids) != checkpoint.token_count(text.tokenizer, before) + 1:
        raise BrokenCheckpointError(f"{checkpoint.folder_of(text.tokenizer)}: begins prompts with other than one token")
    if _is_masked(checkpoint, text):
        # No multiple may exceed the longest text.
        multiple = text_padding(checkpoint) if length % text_padding(checkpoint) == 0 else length
        padding = ours.padding | {"length": None, "pad_to_multiple_of": multiple}
        ours.enable_padding(**padding)
    ours.save(str(path))


def _add_embeddings(theirs: Any, checkpoint: Checkpoint, text: TextInput) -> None:
    """Add the tokens of textual inversions, in the order of their vectors in the text encoder.

    Raises BadEmbeddingError.
    """
    if not checkpoint.embeddings:
        return
    from hypergen_export.conversion.embeddings import vectors_of

    if len(theirs) != _vocabulary_size(checkpoint, text):
        raise BadEmbeddingError(f"{checkpoint.folder_of(text.tokenizer)}: its ids and its text encoder's do not agree")
    for embedding in checkpoint.embeddings:
        tokens = embedding.tokens(len(vectors_of(checkpoint, embedding)[_module_of(checkpoint, text)]))
        if theirs.add_tokens(tokens) != len(tokens):
            raise BadEmbeddingError(
                f"{embedding.file}: {embedding.name} is a word of the tokenizer; give it another name"
            )


def _module_of(checkpoint: Checkpoint, text: TextInput) -> str:
    return next(each.module for each in checkpoint.family.text_encoders if each.name == text.encoder)


def template_of(checkpoint: Checkpoint, text: TextInput) -> tuple[str, str]:
    """What stands before and after a prompt. Raises BrokenCheckpointError."""
    if text.chat is None:
        before, _, after = text.template.partition("{}")
        return before, after
    before, found, after = _as_given(_load(checkpoint, text), text, _SENTINEL).partition(_SENTINEL)
    if not found:
        raise BrokenCheckpointError(f"{checkpoint.folder_of(text.tokenizer)}: its chat template leaves out the prompt")
    return before, after


def text_parameters(checkpoint: Checkpoint, files: dict[str, Path], pool: LoraPool | None = None) -> dict[str, str]:
    """The sampler's parameters of the text encoders, which may have a rank pool.

    `files` are the written tokenizers by name.
    """
    from tokenizers import Tokenizer

    inputs, room = [], []
    for text, encoder in zip(checkpoint.family.text, checkpoint.family.text_encoders, strict=True):
        before, after = template_of(checkpoint, text)
        tokenizer = Tokenizer.from_file(str(files[text.tokenizer]))
        tokenizer.no_padding()
        tokens = checkpoint.sizes[text.tokens] - len(tokenizer.encode(before + after).ids)
        room.append(tokens * text.max_chunks)
        inputs.append(
            {
                "encoder": text.encoder,
                "tokenizer": text.tokenizer,
                "inputs": [tensor.name for tensor in (encoder.with_pool(pool) if pool else encoder).inputs],
                "outputs": [tensor.name for tensor in encoder.outputs],
                "segment": text.segment,
                "before": before,
                "after": after,
                "is_instruction": text.is_instruction,
                "max_chunks": text.max_chunks,
            }
        )
    return {"text_inputs": json.dumps(inputs, ensure_ascii=False), "max_prompt_tokens": str(max(room))}


def _as_given(theirs: Any, text: TextInput, prompt: str) -> str:
    """The text that diffusers' pipeline tokenizes."""
    if text.chat is None:
        return text.template.replace("{}", prompt)
    rendered: str = theirs.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **text.chat
    )
    return rendered


def _is_masked(checkpoint: Checkpoint, text: TextInput) -> bool:
    """Whether padding is masked, so that a shorter one gives the same hidden states."""
    outputs = next(each.outputs for each in checkpoint.family.components if each.name == text.encoder)
    return any("text_tokens" in tensor.axes for tensor in outputs)


def _vocabulary_size(checkpoint: Checkpoint, text: TextInput) -> int:
    return checkpoint.sizes[text.tokenizer.replace("tokenizer", "vocabulary")]


def _with_padding(theirs: Any, length: int) -> Any:
    from tokenizers import Tokenizer

    # A copy, since transformers changes the original's truncation and padding with every call.
    ours = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    ours.enable_truncation(max_length=length)
    ours.enable_padding(length=length, pad_id=theirs.pad_token_id, pad_token=theirs.pad_token)
    return ours


def _check_vocabulary(theirs: Any, folder: Path, vocabulary_size: int) -> None:
    """Reject a vocabulary that cannot pad, does not tell prompts apart or exceeds the text encoder's."""
    if theirs.pad_token_id is None:
        raise BrokenCheckpointError(f"{folder}: its pad_token is null, but prompts must be padded")
    if theirs("a").input_ids == theirs("b").input_ids:
        raise BrokenCheckpointError(f"{folder}: encodes every prompt alike: its vocabulary lacks single letters")
    last = max(theirs.get_vocab().values())
    if last >= vocabulary_size:
        raise BrokenCheckpointError(f"{folder}: has token ids up to {last}, its text encoder takes {vocabulary_size}")


def _load(checkpoint: Checkpoint, text: TextInput) -> Any:
    import transformers

    folder = checkpoint.folder_of(text.tokenizer)
    loader = getattr(transformers, f"{text.tokenizer_class.partition('.')[2]}Fast")
    padding = {"padding_side": "right"} if text.is_instruction else {}  # as SanaPipeline sets it
    try:
        return loader.from_pretrained(folder, local_files_only=True, **padding)
    except Exception as error:  # tokenizers raises a plain Exception
        raise BrokenCheckpointError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
