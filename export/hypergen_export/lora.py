"""LoRAs to merge into a checkpoint: what `--lora` says of them, and what a file's header tells, without torch.

It knows how the trainers name their weights: diffusers and peft by the module's subfolder, peft alone (which has no
idea of a pipeline) by its own prefix, kohya by a prefix per module. How they are merged is `merging`'s matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hypergen_export.errors import BadLoraError, BadOptionError
from hypergen_export.weights import safetensors_header, sha256

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_.-]+")
_LARGEST_SCALE = 2.0

# What a folder's weights are called by diffusers' `save_lora_weights` and by peft's `save_pretrained`.
_USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"
# peft saves a module without saying of which pipeline; what is trained alone is the UNet.
PEFT_PREFIX = "base_model.model."
# How a weight's name begins -> the module that it is for.
_MODULES = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    PEFT_PREFIX: "unet",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA under the name that requests call it by, and the scale at which it is merged."""

    name: str
    file: Path
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Tells it from the same LoRA at another scale; no name holds the sign between them."""
        return f"{self.name}@{self.scale:g}"

    @cached_property
    def sha256(self) -> str:
        """Hash of what it is read from."""
        config = self.file.with_name(_PEFT_CONFIG)
        return sha256([self.file, config] if config.is_file() else [self.file])

    @cached_property
    def modules(self) -> frozenset[str]:
        """The subfolders of a checkpoint whose weights it changes. Raises BadLoraError."""
        return frozenset(self._module(weight) for weight in self._weights)

    @property
    def is_of_peft_alone(self) -> bool:
        """Whether peft's `save_pretrained` wrote it, with the scale in a file of its own."""
        return any(weight.startswith(PEFT_PREFIX) for weight in self._weights)

    @cached_property
    def _weights(self) -> list[str]:
        """The weights' names."""
        try:
            names = [name for name in safetensors_header(self.file) if name != "__metadata__"]
        except (OSError, ValueError) as error:
            raise BadLoraError(f"{self.file}: is no safetensors file ({error})") from error
        if not names:
            raise BadLoraError(f"{self.file}: holds no weights")
        return names

    def _module(self, weight: str) -> str:
        if "lora" not in weight:
            raise BadLoraError(f"{self.file}: is no LoRA, for it holds {weight}")
        if weight.endswith("dora_scale"):
            raise BadLoraError(f"{self.file}: is a DoRA of kohya's format, which diffusers does not read")
        for prefix, module in _MODULES.items():
            if weight.startswith(prefix):
                return module
        raise BadLoraError(
            f"{self.file}: {weight} belongs to no UNet or text encoder; the LoRA is made for another kind of model"
        )


def read_loras(texts: Iterable[str]) -> tuple[Lora, ...]:
    """Each of `[NAME=]PATH[:SCALE]`, PATH a file or a folder that holds one.

    Raises:
        BadOptionError: a name or scale is not legal, or is given twice.
        BadLoraError: there is no such file.
    """
    loras: dict[str, Lora] = {}
    files: dict[str, Path] = {}
    for lora in map(_read_lora, texts):
        if lora.label in loras:
            raise BadOptionError(f"--lora: {lora.name} at scale {lora.scale:g} is given twice")
        if files.setdefault(lora.name, lora.file) != lora.file:
            raise BadOptionError(f"--lora: {lora.name} is the name of two files; call one of them otherwise")
        loras[lora.label] = lora
    return tuple(loras.values())


def _read_lora(text: str) -> Lora:
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        name, rest = "", text
    elif not _NAME.fullmatch(name):
        raise BadOptionError(f"--lora: a name has 1 to 64 letters, digits, '_', '.' and '-', unlike {name[:80]!r}")
    path, scale = _split_scale(rest)
    place = Path(path).expanduser()
    return Lora(name=name or _name_of(place), file=_find_file(place), scale=scale)


def _split_scale(text: str) -> tuple[str, float]:
    path, colon, last = text.rpartition(":")
    try:
        scale = float(last) if colon else 1.0
    except ValueError:  # a colon of the path's own
        return text, 1.0
    if not 0 < scale <= _LARGEST_SCALE:
        raise BadOptionError(f"--lora: a scale is above 0 and at most {_LARGEST_SCALE:g}, unlike {last}")
    # As precise as it is written into names.
    return (path if colon else text), float(f"{scale:g}")


def _name_of(place: Path) -> str:
    """A legal name for what is called by its path alone."""
    place = place.resolve()
    name = place.stem if place.is_file() else place.name
    return _OTHER_CHARACTERS.sub("-", name).strip("-")[:64] or "lora"


def _find_file(place: Path) -> Path:
    if place.is_file():
        return place
    if not place.is_dir():
        raise BadLoraError(f"{place}: there is no such LoRA file or folder")
    usual = [place / name for name in _USUAL_FILES if (place / name).is_file()]
    found = usual[:1] or sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise BadLoraError(f"{place}: holds {len(found) or 'no'} .safetensors files; name the LoRA's own")
    return found[0]
