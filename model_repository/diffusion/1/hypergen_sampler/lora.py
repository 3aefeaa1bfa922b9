"""LoRAs: which columns of the rank pool hold them, or which models, if they are merged into the weights.

A row's LoRAs in the pool are one vector: their scales in their columns, zeros elsewhere. Images with different ones
share a batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The input of a component with a rank pool.
LORA_SCALES = "lora_scales"


@dataclass(frozen=True, kw_only=True)
class ServedLora:
    """A LoRA in the rank pool, or merged at one scale."""

    name: str
    scale: float
    """The default, or that of the merged models."""
    columns: tuple[int, ...] = ()
    """Those of the pool that hold it; none if it is merged."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Component -> the model that replaces it; contains only components that the LoRA changes."""


@dataclass(frozen=True, kw_only=True)
class LoraSelection:
    """The LoRAs of a request; by default none."""

    scales: tuple[float, ...] = ()
    """For each column of the pool; empty if there is no pool."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Component -> the model that replaces it."""

    def model(self, component: str) -> str:
        """The model that serves the component."""
        return self.models.get(component, component)


NO_LORAS = LoraSelection()


def read_loras(text: str) -> tuple[ServedLora, ...]:
    """Parse the value of the parameter, a JSON list. Raises ValueError."""
    try:
        return tuple(_read(entry) for entry in json.loads(text))
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.pbtxt of diffusion has a parameter loras of no use ({error})") from None


def _read(entry: Mapping[str, Any]) -> ServedLora:
    placed = {"columns": tuple(entry["columns"])} if "columns" in entry else {"models": entry["models"]}
    return ServedLora(name=entry["name"], scale=entry["scale"], **placed)


class LoraTable:
    """The LoRAs that are served: those of the configuration, or of the file `loras.json` once there is one.

    The file replaces them while the model is served, when LoRAs come and go; it is renamed into place.
    """

    def __init__(self, folder: Path, configured: tuple[ServedLora, ...]) -> None:
        self._file = folder / "loras.json"
        self._served = configured
        self._version: tuple[int, int] | None = None

    def read(self) -> tuple[tuple[ServedLora, ...], bool]:
        """The LoRAs, and whether they have changed since the last call."""
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return self._served, False
        version = (status.st_ino, status.st_mtime_ns)
        is_new = version != self._version
        if is_new:
            self._served, self._version = read_loras(self._file.read_text(encoding="utf-8")), version
        return self._served, is_new


def pool_scales(rank: int, chosen: Sequence[tuple[ServedLora, float]]) -> tuple[float, ...]:
    """The scale of each of the pool's columns for LoRAs and their scales; those of one LoRA are added."""
    scales = [0.0] * rank
    for lora, scale in chosen:
        for column in lora.columns:
            scales[column] += scale
    return tuple(scales)
