"""Cache keys, which change whenever an export would differ. Computed from files alone, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component
from hypergen_export.checkpoints.defaults import text_padding
from hypergen_export.checkpoints.family import TextInput
from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.checkpoints.lora import Placement

_PACKAGE = Path(__file__).parents[1]
# Sources, or folders of them, that determine a component's plan, its merged LoRA and its ONNX file. All sources are in
# the repository's key.
_PLAN = ("engines/profiles.py", "engines/tensorrt.py")
_EMBEDDING = ("checkpoints/embeddings.py", "conversion/embeddings.py")
_LAYER_NAMES = ("checkpoints/layer_paths.py", "conversion/layer_names.py", "conversion/transformer_names.py")
_MERGING = ("checkpoints/lora.py", "conversion/lora_changes.py", "conversion/merging.py", *_LAYER_NAMES)
_POOLING = ("conversion/pooling.py", *_LAYER_NAMES)
_QUANTIZATION = (
    "engines/accuracy.py",
    "engines/calibration.py",
    "engines/engine.py",
    "engines/formats.py",
    "engines/qdq.py",
    "engines/quantization.py",
    "engines/ranges.py",
)
_CONVERSION = (
    "checkpoints/components.py",
    "checkpoints/families",
    "conversion/examples.py",
    "conversion/wrappers",
    "conversion/loading.py",
    "conversion/sources.py",
    "conversion/linking.py",
    "conversion/cutting.py",
    "conversion/onnx.py",
    "conversion/parity.py",
)


def component_key(checkpoint: Checkpoint, component: Component, hashes: ContentHashes, dtype: str = "float32") -> str:
    """Key of a component's ONNX file: its dtype, the module's files, the merged LoRA, the sources that convert them.

    Checkpoints of other families have the same key for a module that they share, such as a VAE.
    """
    folder = checkpoint.folder_of(component.module)
    return _digest(
        component.name,
        component.wrapper,
        component.loader,
        repr((component.inputs, component.outputs)),
        dtype,
        component.sizes_of(checkpoint.sizes),
        _contents([folder / "config.json", *_sources(_CONVERSION)]),
        [(path.name, hashes(path)) for path in weight_files(checkpoint, component.module)],
        *_lora_parts(component),
        *_embedding_parts(checkpoint, component),
        *([repr(component.pool), _contents(_sources(_POOLING))] if component.pool else []),
    )


def weight_files(checkpoint: Checkpoint, module: str) -> list[Path]:
    """The files that hold the module's weights."""
    return [checkpoint.folder_of(module) / name for name in checkpoint.weights(module).files]


def plan_key(onnx_key: str, *build_inputs: Any) -> str:
    """Key of a TensorRT plan: its ONNX file, and `build_inputs`, everything else that the build depends on."""
    return _digest(onnx_key, repr(build_inputs), _contents(_sources(_PLAN)))


def quantized_key(onnx_key: str, dtype: str, *calibration: Any) -> str:
    """Key of a quantised component: its ONNX file, and `calibration`, what else its ranges depend on."""
    return _digest(onnx_key, dtype, repr(calibration), _contents(_sources(_QUANTIZATION)))


def pool_parts(placements: Iterable[Placement]) -> list[Any]:
    """Key parts of a plan that holds a rank pool's weights: the LoRAs, and the sources that read and place them."""
    return [[(each.lora.sha256, each.columns) for each in placements], _contents(_sources(_MERGING))]


def tokenizer_key(checkpoint: Checkpoint, text: TextInput) -> str:
    """Key of the tokenizer's file for the sampler."""
    files = (path for path in checkpoint.folder_of(text.tokenizer).iterdir() if path.is_file())
    return _digest(
        repr(text),
        text_padding(checkpoint),
        dict(checkpoint.sizes),
        _contents([*files, _PACKAGE / "conversion" / "tokenizer.py"]),
        *_embeddings(checkpoint),
    )


def repository_key(parts: Iterable[str], settings: dict[str, str], sources: Iterable[Path]) -> str:
    """Key of a whole repository: its parts' keys, all settings, and the contents of `sources` and this package."""
    return _digest(list(parts), settings, _contents([*sources, *_PACKAGE.rglob("*.py")]))


def _lora_parts(component: Component) -> list[Any]:
    """Key parts of the merged LoRA: the file's content, the scale and the sources that merge it."""
    if component.lora is None:
        return []
    return [component.lora.sha256, component.lora.scale, _contents(_sources(_MERGING))]


def _embedding_parts(checkpoint: Checkpoint, component: Component) -> list[Any]:
    """Key parts of the embeddings that a text encoder knows."""
    return _embeddings(checkpoint) if component.module in checkpoint.text_encoders else []


def _embeddings(checkpoint: Checkpoint) -> list[Any]:
    given = [(embedding.name, embedding.sha256) for embedding in checkpoint.embeddings]
    return [given, _contents(_sources(_EMBEDDING))] if given else []


def _sources(names: Iterable[str]) -> list[Path]:
    """The named files of this package, and the Python files of the named folders."""
    paths = [_PACKAGE / name for name in names]
    return [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]


def _contents(paths: Iterable[Path]) -> list[tuple[str, str]]:
    # By name, since the order of paths depends on the checkpoint's location.
    return sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
