"""CLIP's tokenizer, which no single file holds: its files are written from the merges beside this module."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

_MERGES = Path(__file__).with_name("data") / "clip_merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_POSITIONS = 77


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """Write a CLIPTokenizer as diffusers' checkpoints have it. `pad_token`: "!" of OpenCLIP, else the end token."""
    folder.mkdir(parents=True)
    merges = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    characters = list(_byte_characters())
    tokens = [*characters, *(f"{each}</w>" for each in characters), *(each.replace(" ", "") for each in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad_token}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": _POSITIONS, "do_lower_case": True}
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", config),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _byte_characters() -> Iterator[str]:
    """One printable character per byte value, in the order of CLIP's vocabulary (`bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(0x100 + each) for each in range(256 - len(printable)))
