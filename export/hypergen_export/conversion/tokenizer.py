"""Write a tokenizer as one `tokenizers` file with its padding and truncation, so serving needs no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.errors import BrokenCheckpointError, ParityMissedError, first_line

# Empty, short, too long, not ASCII, and with case, whitespace and special tokens.
_PROBES = (
    "",
    "a rocket on a yellow background",
    "An  ASTRONAUT's café, 1924!\n",
    "日本語 \U0001f680 naïve",
    "word " * 200,
    "<|startoftext|> twice <|endoftext|>",
)


def write_tokenizer(checkpoint: Checkpoint, name: str, path: Path) -> None:
    """Write a `tokenizers` file whose encodings are the ids that diffusers feeds the text encoder.

    `name` is the tokenizer's folder in the checkpoint.

    Raises:
        BrokenCheckpointError: the tokenizer's files cannot be read.
        ParityMissedError: the file would encode a prompt differently.
    """
    length = checkpoint.sizes["tokens"]
    folder = checkpoint.folder / name
    theirs = _load(folder)
    _check_vocabulary(theirs, folder, checkpoint.sizes[name.replace("tokenizer", "vocabulary")])
    ours = _with_padding(theirs, length)
    for prompt in _PROBES:
        expected = theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        if ours.encode(prompt).ids != expected:
            raise ParityMissedError(f"{name}: encodes {prompt[:40]!r} differently than transformers")
    ours.save(str(path))


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


def _load(folder: Path) -> Any:
    from transformers import CLIPTokenizerFast

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises a plain Exception
        raise BrokenCheckpointError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
