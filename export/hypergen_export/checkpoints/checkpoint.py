"""Finding and validating checkpoints: a hub id, a folder or a bundled model becomes a `Checkpoint`.

Reads diffusers' layout (model_index.json, one subfolder per module) and JSON files only. Weights are loaded
elsewhere, so torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hypergen_export.checkpoints.components import Sizes
from hypergen_export.checkpoints.detection import (
    check_classes,
    check_configs,
    check_preview_vae,
    find_family,
    with_preview_vae,
    with_stated_vae,
)
from hypergen_export.checkpoints.embeddings import Embedding
from hypergen_export.checkpoints.families.tensors import PREVIEW_DECODER
from hypergen_export.checkpoints.family import ConfigOverrides, Family
from hypergen_export.checkpoints.hub import IsNeeded, find_snapshot
from hypergen_export.checkpoints.weights import (
    Weights,
    missing_shards,
    select_weights,
    vocabularies,
    weight_file_problem,
    wrong_content,
)
from hypergen_export.errors import (
    BrokenCheckpointError,
    NotADiffusersPipelineError,
    UnknownModelError,
    first_line,
)

SHIPPED_MODEL = "hypergen/emoji"
SHIPPED_TRANSFORMER = "hypergen/emoji-flow"
INDEX = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
DEFAULTS = "hypergen_defaults.json"
# Defaults of transformers' CLIPTextConfig, for entries that a config leaves out.
_CLIP_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "max_position_embeddings": 77,
    "projection_dim": 512,
}
_PACKAGE = Path(__file__).parents[1]
# In a wheel the shipped checkpoints are inside the package, in a source checkout beside it.
_SHIPPED_FOLDERS = {
    model: (_PACKAGE / "bundled" / folder, _PACKAGE.parent / folder / "checkpoint")
    for model, folder in ((SHIPPED_MODEL, "emoji"), (SHIPPED_TRANSFORMER, "emoji_flow"))
}


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A module or tokenizer that is not the checkpoint's own: its folder, and its class as "library.Class"."""

    folder: Path
    loader: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder in diffusers' layout and its family. `index` is its model_index.json.

    `replaced`: subfolders that lie elsewhere, such as a VAE in place of the checkpoint's own.
    `embeddings` are textual inversions that its tokenizers and text encoders are to know.
    """

    folder: Path
    family: Family
    index: Mapping[str, Any]
    replaced: Mapping[str, Path] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()

    def folder_of(self, part: str) -> Path:
        """The folder of a module or tokenizer."""
        return self.replaced.get(part, self.folder / part)

    @property
    def text_encoders(self) -> frozenset[str]:
        """The modules of the text encoders."""
        return frozenset(component.module for component in self.family.text_encoders)

    def config(self, module: str) -> Mapping[str, Any]:
        """The module's config.json; that of a CLIP text encoder is completed with transformers' defaults."""
        config = read_json(self.folder_of(module) / "config.json")
        if not self.family.modules.get(module, "").startswith("transformers.CLIPText"):
            return config
        # The config of a complete CLIP model contains that of its text encoder.
        text = config.get("text_config")
        return {**_CLIP_TEXT_DEFAULTS, **(text if isinstance(text, dict) else config)}

    def tokenizer_length(self, tokenizer: str) -> int | None:
        """The length that the tokenizer's config states, if any."""
        stated = read_json(self.folder_of(tokenizer) / "tokenizer_config.json").get("model_max_length")
        # transformers writes 10**30 for "no limit".
        return int(stated) if stated else None

    def token_count(self, tokenizer: str, text: str) -> int:
        """The tokens of a text, without those that the tokenizer adds. Raises BrokenCheckpointError."""
        file = self.folder_of(tokenizer) / "tokenizer.json"
        try:
            return len(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)
        except Exception as error:  # tokenizers raises a plain Exception
            raise BrokenCheckpointError(f"{file}: cannot be read ({first_line(error)})") from error

    def weights(self, module: str) -> Weights:
        """The files that hold the module's weights."""
        folder = self.folder_of(module)
        chosen = select_weights(sorted(entry.name for entry in folder.iterdir()))
        if chosen is None:
            raise BrokenCheckpointError(f"{folder}: no weights (*.safetensors or *.bin) here")
        return chosen

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Defaults that the checkpoint's author states in hypergen_defaults.json; empty if there is no such file."""
        path = self.folder / DEFAULTS
        return read_json(path) if path.exists() else {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the checkpoint: its folder, its id in the hub's cache, and the checkpoints it was made from."""
        cached = (part for part in self.folder.parts if part.startswith("models--"))
        made_from = (self.index.get("_name_or_path"), self.denoiser_config.get("_name_or_path"))
        denoiser = self.folder_of(self.family.denoiser.module)
        return (self.folder.name, denoiser.name, *cached, *(str(name) for name in made_from if name))

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """The denoiser's config.json."""
        return self.config(self.family.denoiser.module)

    @property
    def overrides(self) -> ConfigOverrides:
        """What the checkpoint's diffusers pipeline changes in its configs."""
        return self.family.pipelines[str(self.index["_class_name"])]

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The checkpoint's scheduler_config.json with the scheduler class, which the index names."""
        return {**read_json(self.folder / SCHEDULER), "_class_name": self.index["scheduler"][1]}

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes that tensor axes refer to by name, and how many pixels wide and high a latent pixel is."""
        sampling = self.family.sampling
        vae, sizes = self.config("vae"), self.family.read_sizes(self)
        return {
            "vae_scale_factor": 2 ** (self.family.vae_levels(vae) - 1) * sampling.latent_patch_size,
            "patch_size": sampling.patch_size,
            "token_width": sizes["latent_channels"] * sampling.patch_size**2,
            **sizes,
        }


def open_checkpoint(model: str, replaced: Mapping[str, Replacement] | None = None) -> Checkpoint:
    """Find `model` and check that it can be converted, with the replaced parts in place of its own.

    From the hub, weights of parts that are replaced are not downloaded.

    Raises:
        UnknownModelError, NotADiffusersPipelineError, UnsupportedModelError, BrokenCheckpointError
    """
    replaced = replaced or {}
    folder = find_folder(model, lambda module: module not in replaced)
    index = {**_read_index(model, folder), **{part: each.loader.split(".") for part, each in replaced.items()}}
    family = find_family(model, index, lambda module: read_json(folder / module / "config.json"))
    family = with_preview_vae(model, with_stated_vae(model, family, index), index)
    check_classes(model, index, family)
    checkpoint = Checkpoint(folder, family, index, {part: each.folder for part, each in replaced.items()})
    _check_files(checkpoint)
    configs = {module: checkpoint.config(module) for module in family.modules}
    sizes = _readable_sizes(checkpoint)
    check_configs(model, family, configs, sizes)
    if PREVIEW_DECODER.module in configs:
        check_preview_vae(model, configs[PREVIEW_DECODER.module], sizes)
    return checkpoint


def check_pipeline(model: str, folder: Path) -> None:
    """Reject a pipeline that is not served, by its index and its denoiser's config alone: before any long work.

    Raises:
        NotADiffusersPipelineError, UnsupportedModelError, BrokenCheckpointError
    """
    find_family(model, _read_index(model, folder), lambda module: read_json(folder / module / "config.json"))


def _read_index(model: str, folder: Path) -> Mapping[str, Any]:
    if not (folder / INDEX).is_file():
        raise NotADiffusersPipelineError(f"{model}: not a diffusers pipeline: it has no {INDEX}")
    return read_json(folder / INDEX)


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object. Raises BrokenCheckpointError with the file's name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenCheckpointError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        reason = (path.is_file() and wrong_content(path)) or error
        raise BrokenCheckpointError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise BrokenCheckpointError(f"{path}: is not a JSON object")
    return content


def find_folder(model: str, is_needed: IsNeeded = lambda _: True) -> Path:
    """The folder of a checkpoint: a path, a hub id, or a bundled model. Raises UnknownModelError.

    From the hub, weights of modules that are not needed are not downloaded.
    """
    if model in _SHIPPED_FOLDERS:
        return _shipped_folder(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADiffusersPipelineError(f"{model}: is a file; give the folder of a diffusers pipeline or a hub id")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UnknownModelError(f"{model}: no such folder, and not a hub id of the form owner/name")
    return find_snapshot(model, is_needed)


def _shipped_folder(model: str) -> Path:
    for folder in _SHIPPED_FOLDERS[model]:
        if (folder / INDEX).is_file():
            return folder
    raise UnknownModelError(f"{model}: the bundled checkpoint is missing from this installation")


def _check_files(checkpoint: Checkpoint) -> None:
    for module in (*checkpoint.family.modules, *checkpoint.family.tokenizers):
        if not checkpoint.folder_of(module).is_dir():
            raise BrokenCheckpointError(f"{checkpoint.folder_of(module)}: missing")
    for module in checkpoint.family.modules:
        checkpoint.config(module)
        _check_weights(checkpoint.folder_of(module), checkpoint.weights(module))
    for text in checkpoint.family.text:
        _check_tokenizer(checkpoint.folder_of(text.tokenizer), text.tokenizer_class)
    _ = checkpoint.scheduler, checkpoint.defaults


def _check_weights(folder: Path, weights: Weights) -> None:
    try:
        missing = missing_shards(folder, weights)
    except ValueError as error:
        raise BrokenCheckpointError(f"{folder}: {error}") from error
    if missing:
        raise BrokenCheckpointError(f"{folder / missing[0]}: missing: it is a part of the weights")
    for file in weights.files:
        problem = weight_file_problem(folder / file)
        if problem:
            raise BrokenCheckpointError(f"{folder / file}: the weights cannot be read ({problem})")


def _check_tokenizer(folder: Path, tokenizer_class: str) -> None:
    readable = vocabularies(tokenizer_class)
    found = [files for files in readable if all((folder / file).is_file() for file in files)]
    if not found:
        expected = " or ".join(" and ".join(files) for files in readable)
        name = tokenizer_class.partition(".")[2]
        raise BrokenCheckpointError(f"{folder}: has no vocabulary for a {name} ({expected})")
    for file in found[0]:
        problem = wrong_content(folder / file)
        if problem:
            raise BrokenCheckpointError(f"{folder / file}: cannot be read ({problem})")


def _readable_sizes(checkpoint: Checkpoint) -> Sizes:
    try:
        return checkpoint.sizes
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpointError(f"{checkpoint.folder}: a config.json lacks {error}") from error
