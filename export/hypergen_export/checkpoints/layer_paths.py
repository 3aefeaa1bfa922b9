"""Paths of layers as files of LoRAs write them. The names of a rank pool's weights follow from them."""

from __future__ import annotations


def flat(path: str) -> str:
    """A layer's path as kohya writes it, without the optional prefix of transformers' text encoders."""
    return path.replace(".", "_").removeprefix("text_model_")
