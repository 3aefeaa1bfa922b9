"""The files of `--lora-dir`: the names that requests use for them."""

from __future__ import annotations

import re
from pathlib import Path

_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")


def requested_name(file: Path) -> str:
    """The name by which requests select a file; empty if no character of its name may be in one."""
    return _OTHER_CHARACTERS.sub("-", file.stem).strip("-")[:64]
