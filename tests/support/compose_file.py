"""compose.yaml with its variables filled in, as Compose does it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "compose.yaml"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def read_compose(environment: Mapping[str, str]) -> dict[str, Any]:
    """The file with its variables filled in: from `environment` where they are not empty, else their defaults."""
    filled: dict[str, Any] = fill(as_written(), environment)
    return filled


@cache
def as_written() -> Any:
    """The file as YAML has it, with anchors resolved."""
    return yaml.safe_load(FILE.read_text())


def fill(value: Any, environment: Mapping[str, str]) -> Any:
    """In strings alone, which stay strings."""
    if isinstance(value, dict):
        return {name: fill(item, environment) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item, environment) for item in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: environment.get(match[1]) or match[2], value)
    return value
