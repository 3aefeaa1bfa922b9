"""Variants of the checkpoint with a LoRA merged into its weights, and the models that replace its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LoraVariant:
    """A LoRA at one scale; without a name, the unmodified checkpoint."""

    name: str = ""
    scale: float = 0.0
    models: Mapping[str, str] = field(default_factory=dict)
    """Component -> the model that replaces it; contains only components that the LoRA changes."""

    def model(self, component: str) -> str:
        """The model that serves the component."""
        return self.models.get(component, component)


BASE = LoraVariant()


def read_variants(text: str) -> tuple[LoraVariant, ...]:
    """Parse the value of the parameter, a JSON list. Raises ValueError."""
    try:
        return tuple(LoraVariant(**entry) for entry in json.loads(text))
    except TypeError as error:
        raise ValueError(f"config.pbtxt of diffusion has a parameter loras of no use ({error})") from None
