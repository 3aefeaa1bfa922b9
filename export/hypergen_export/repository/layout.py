"""Where the files of a repository lie, and those of the sampler that are copied into it."""

from __future__ import annotations

from pathlib import Path

from hypergen_export.checkpoints.components import Component

SAMPLER = "diffusion"
SCHEDULERS = "schedulers.json"
ONNX = "model.onnx"
_PACKAGE = Path(__file__).parents[1]
# The sampler is inside the package in a wheel, and in model_repository in a source checkout.
_SAMPLER_FOLDERS = (_PACKAGE / "bundled" / SAMPLER, _PACKAGE.parents[1] / "model_repository" / SAMPLER)


def version_folder(repository: Path, component: Component) -> Path:
    """The folder of version 1 of a component."""
    return repository / component.name / "1"


def tokenizer_file(name: str) -> Path:
    """Path of a tokenizer's file in a repository."""
    return Path(SAMPLER) / f"{name}.json"


def sampler_folder() -> Path:
    """The folder of the sampler: its config.pbtxt is a template, the files of its version are copied."""
    return next((folder for folder in _SAMPLER_FOLDERS if folder.is_dir()), _SAMPLER_FOLDERS[-1])


def sampler_sources() -> list[Path]:
    """The sampler's Python files."""
    return sorted((sampler_folder() / "1").rglob("*.py"))
