"""What a UNet predicts, noise or velocity: told by an option, the file's metadata, or a `.yaml` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypergen_export.errors import BrokenCheckpointError, UnsupportedModelError
from hypergen_export.single_files.kinds import EPSILON, VELOCITY
from hypergen_export.single_files.reading import SingleFile

_NAMES = {"epsilon": EPSILON, "eps": EPSILON, "v": VELOCITY, "v_prediction": VELOCITY, "v-prediction": VELOCITY}
# What trainers and mergers write into metadata (modelspec.org), and what a 2.x model of 768 pixels is called there.
_METADATA = "modelspec.prediction_type"
_ARCHITECTURE = "modelspec.architecture"
_ARCHITECTURES = {"stable-diffusion-v2-768-v": VELOCITY, "stable-diffusion-v2-512": EPSILON}
# Empty tensors with which model sites mark SDXL models: velocity, and a schedule that ends in pure noise.
_MARKER, _ZERO_SNR_MARKER = "v_pred", "ztsnr"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction type, who says so (empty if nobody does), and whether the schedule ends in pure noise."""

    type: str
    said_by: str
    is_zero_snr: bool


def prediction_of(file: SingleFile, has_velocity_by_default: bool, option: str | None) -> Prediction:
    """The first of: the option, the markers, the metadata, a `.yaml` beside the file, the kind's own.

    Raises BrokenCheckpointError, UnsupportedModelError for a statement that cannot be followed.
    """
    said = (
        ("--prediction-type", option),
        (f"the tensor {_MARKER}", VELOCITY if _MARKER in file.tensors else None),
        ("its metadata", _metadata(file.metadata)),
        (f"{file.path.with_suffix('.yaml').name}", _beside(file)),
    )
    by, stated = next(((by, stated) for by, stated in said if stated), ("", None))
    return Prediction(
        type=stated or (VELOCITY if has_velocity_by_default else EPSILON),
        said_by=by,
        is_zero_snr=_ZERO_SNR_MARKER in file.tensors,
    )


def _metadata(metadata: Mapping[str, str]) -> str | None:
    stated = _NAMES.get(metadata.get(_METADATA, "").lower())
    return stated or _ARCHITECTURES.get(metadata.get(_ARCHITECTURE, ""))


def _beside(file: SingleFile) -> str | None:
    """The `parameterization` of latent diffusion's config beside the file. The weights say all else that it does."""
    import yaml

    path = file.path.with_suffix(".yaml")
    if not path.is_file():
        return None
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        stated = content["model"]["params"].get("parameterization", "eps")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpointError(f"{path}: is not a config of latent diffusion (it has no model.params)") from error
    if stated not in ("eps", "v"):
        raise UnsupportedModelError(f"{path}: its parameterization is {stated!r}, but only eps and v are supported")
    return _NAMES[stated]
