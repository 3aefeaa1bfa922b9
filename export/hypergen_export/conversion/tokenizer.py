"""The tokenizer as one file that needs no transformers: what pads and truncates stands inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.errors import BrokenCheckpointError, ParityMissedError, first_line

# Empty, short, longer than any text encoder reads, beyond ASCII, case, space and special tokens.
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
        ParityMissedError: the file would encode a prompt in another way.
    """
    length = checkpoint.sizes["tokens"]
    folder = checkpoint.folder / name
    theirs = _load(folder)
    _check_vocabulary(theirs, folder, checkpoint.sizes[name.replace("tokenizer", "vocabulary")])
    ours = _with_padding(theirs, length)
    for prompt in _PROBES:
        expected = theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        if ours.encode(prompt).ids != expected:
            raise ParityMissedError(f"{name}: encodes {prompt[:40]!r} in another way than transformers")
    ours.save(str(path))


def _with_padding(theirs: Any, length: int) -> Any:
    from tokenizers import Tokenizer

    # A copy, since transformers changes truncation and padding of its own one with every call.
    ours = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    ours.enable_truncation(max_length=length)
    ours.enable_padding(length=length, pad_id=theirs.pad_token_id, pad_token=theirs.pad_token)
    return ours


def _check_vocabulary(theirs: Any, folder: Path, positions: int) -> None:
    """Refuse what diffusers' pipeline could not read prompts with, or would read all alike."""
    if theirs.pad_token_id is None:
        raise BrokenCheckpointError(f"{folder}: its pad_token is null, and prompts must be padded")
    if theirs("a").input_ids == theirs("b").input_ids:
        raise BrokenCheckpointError(f"{folder}: reads every prompt alike, for its vocabulary lacks single letters")
    last = max(theirs.get_vocab().values())
    if last >= positions:
        raise BrokenCheckpointError(f"{folder}: has tokens up to {last}, its text encoder reads {positions}")


def _load(folder: Path) -> Any:
    from transformers import CLIPTokenizerFast

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise BrokenCheckpointError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
