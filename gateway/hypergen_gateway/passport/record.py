"""A passport as a value, and as the file `passport.json` in the repository that it is about.

Its summary is also written into the sampler's parameters, where every gateway in front of that Triton reads it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hypergen_gateway.errors import InternalError
from hypergen_gateway.generation.backend import ModelDescription, Quality
from hypergen_gateway.passport.errors import PassportError
from hypergen_gateway.triton.client import SAMPLER, to_description

FILE = "passport.json"
FORMAT = "hypergen passport"
EXPORT_RECORD = "hypergen.json"
CONFIG = f"{SAMPLER}/config.pbtxt"
# What an export was made of, as the exporter records it.
_SOURCE = {"model", "vae", "text_encoders", "prediction_type", "embeddings"}
_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class ImageQuality:
    """One image's distance from its counterpart in float32; see `Quality`. `seconds` without waiting."""

    prompt: str
    seed: int
    psnr: float
    ssim: float
    latents_error: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SettingQuality:
    """The images of one setting: of a request with `fields` beside the model's defaults."""

    fields: Mapping[str, int | float | str]
    images: tuple[ImageQuality, ...]

    def summary(self, reference_seconds: float) -> Quality:
        """Means and worst values; `reference_seconds` is the shortest time of an image in float32."""
        psnr, ssim = [each.psnr for each in self.images], [each.ssim for each in self.images]
        errors = [each.latents_error for each in self.images if each.latents_error is not None]
        return Quality(
            fields=self.fields,
            prompts=len(self.images),
            psnr=round(fmean(psnr), _DIGITS),
            lowest_psnr=round(min(psnr), _DIGITS),
            ssim=round(fmean(ssim), _DIGITS),
            lowest_ssim=round(min(ssim), _DIGITS),
            latents_error=round(fmean(errors), _DIGITS) if errors else None,
            highest_latents_error=round(max(errors), _DIGITS) if errors else None,
            time=round(shortest_time(self.images) / reference_seconds, _DIGITS),
        )


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What was measured, for which export (`key` is its record's), in which request, and against what."""

    key: str
    model: str
    engine: str
    dtype: str
    reference: str
    reference_seconds: float
    measured: str  # ISO 8601
    request: Mapping[str, int | float | str]
    settings: tuple[SettingQuality, ...]

    @property
    def summaries(self) -> tuple[Quality, ...]:
        """The quality of each setting."""
        return tuple(setting.summary(self.reference_seconds) for setting in self.settings)


def shortest_time(images: Sequence[Any]) -> float:
    """The least of their `seconds`: the others also count what else the machine did, and a Triton's first calls."""
    return float(min(image.seconds for image in images))


@dataclass(frozen=True, kw_only=True)
class Repository:
    """An exported repository: its folder, the record of its export and its model's description."""

    folder: Path
    record: Mapping[str, Any]
    description: ModelDescription

    @property
    def key(self) -> str:
        """The key of the export, which differs between any two that could generate different images."""
        return str(self.record["key"])


def open_repository(folder: Path) -> Repository:
    """Read an exported repository. Raises PassportError."""
    try:
        record = json.loads((folder / EXPORT_RECORD).read_bytes())
        config = _read_config(folder)
    except (OSError, ValueError, text_format.ParseError) as error:
        raise PassportError(f"{folder}: not an exported repository ({error})") from error
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    try:
        description = to_description(parameters)
        is_known = isinstance(record, dict) and {"key", "engine", "dtype", "source", "files"} <= record.keys()
        is_known = is_known and isinstance(record["source"], dict) and record["source"].keys() == _SOURCE
    except InternalError:  # a parameter is missing
        is_known = False
    if not is_known:
        raise PassportError(f"{folder}: exported by an earlier version of HyperGen; export it again")
    return Repository(folder=folder, record=record, description=description)


def read_passport(repository: Repository) -> Passport | None:
    """The repository's passport; None if it has none, or only that of an earlier export."""
    try:
        data = json.loads((repository.folder / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PassportError(f"{repository.folder / FILE}: cannot be read ({error})") from error
    try:
        passport = _from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise PassportError(f"{repository.folder / FILE}: not a passport; measure it again") from error
    return passport if passport.key == repository.key else None


def write_passport(repository: Repository, passport: Passport) -> None:
    """Write passport.json and the summary in the sampler's parameters. Raises PassportError."""
    folder = repository.folder
    config = _read_config(folder)
    config.parameters["passport"].string_value = json.dumps([asdict(each) for each in passport.summaries])
    text = text_format.MessageToString(config)
    record = json.loads((folder / EXPORT_RECORD).read_bytes())
    # The exporter compares sizes to tell whether its files are as it left them.
    record["files"][CONFIG] = len(text.encode())
    try:
        _replace(folder / FILE, json.dumps({"format": FORMAT, **asdict(passport)}, indent=2, ensure_ascii=False) + "\n")
        _replace(folder / CONFIG, text)
        _replace(folder / EXPORT_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise PassportError(f"{folder}: the passport cannot be written ({error.strerror or error})") from error


def _read_config(folder: Path) -> Any:
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def _from_json(data: Mapping[str, Any]) -> Passport:
    settings = tuple(
        SettingQuality(fields=each["fields"], images=tuple(ImageQuality(**image) for image in each["images"]))
        for each in data["settings"]
    )
    others = {name: value for name, value in data.items() if name not in ("format", "settings")}
    return Passport(settings=settings, **others)


def _replace(file: Path, text: str) -> None:
    """Write a file that is complete at any moment, readable by whoever reads the others."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as new:
            new.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
