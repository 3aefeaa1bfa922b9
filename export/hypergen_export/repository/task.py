"""The work of an export: what is to be converted, and what earlier exports have. Computed without torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.checkpoint import SCHEDULER, Checkpoint
from hypergen_export.checkpoints.components import CALIBRATED, QUANTIZED, Component, LoraPool
from hypergen_export.checkpoints.defaults import checkpoint_parameters
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.checkpoints.files import on_one_file_system
from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.checkpoints.weights import float32_bytes, float32_pool_bytes, stored_dtypes
from hypergen_export.engines.engine import Size
from hypergen_export.engines.profiles import Shapes, profiles, shapes_of
from hypergen_export.engines.tensorrt import Target
from hypergen_export.repository.cache_key import (
    component_key,
    plan_key,
    pool_parts,
    quantized_key,
    repository_key,
    tokenizer_key,
    weight_files,
)
from hypergen_export.repository.layout import sampler_folder, sampler_sources, tokenizer_file, version_folder
from hypergen_export.repository.request import ExportRequest
from hypergen_export.repository.staging import PreviousExport, sibling_exports

# An ONNX file without its large weights.
_GRAPH_BYTES = 64 * 2**20
# Defaults of the images that ranges of activations are taken from.
_CALIBRATING = (
    "default_num_inference_steps",
    "default_guidance_scale",
    "default_width",
    "default_height",
    "suggestions",
    "zeros_for_no_negative_prompt",
)


@dataclass(frozen=True)
class ExportTask:
    """The work of an export: its components, their cache keys, and which of them previous exports contain.

    `previous` is the export at the output folder; its record is empty if there is none. `sizes` are the image sizes to
    build, empty for an engine that takes any; `target` is what TensorRT builds for, None for OpenVINO.
    """

    checkpoint: Checkpoint
    request: ExportRequest
    previous: PreviousExport
    sizes: tuple[Size, ...]
    target: Target | None

    @property
    def rows(self) -> int:
        """The maximum batch size of a component."""
        return self.checkpoint.family.guided_rows * self.request.max_batch_size

    @property
    def settings(self) -> dict[str, str]:
        """The sampler's parameters that depend on the options."""
        return {**self.request.settings, "max_batch_size": str(self.rows)}

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The checkpoint's components, then for each merged LoRA the variants of the components that it changes."""
        variants = (variant for lora in self.merged for variant in self.variants(lora).values())
        return (*self.own, *variants)

    @cached_property
    def own(self) -> tuple[Component, ...]:
        """The components of the unmodified checkpoint."""
        components = self.checkpoint.family.components
        components = with_deep_cache(components) if self.request.deep_cache else components
        return tuple(component.with_pool(self.pool) for component in components) if self.pool else components

    @cached_property
    def pool(self) -> LoraPool | None:
        """The rank pool; None if none is asked for."""
        used = sum(placement.lora.rank for placement in self.placements)
        rank = max(used, self.request.lora_rank)
        if not rank:
            return None
        # Files that come later may change any layer.
        kernels = bool(self.request.lora_rank) or any(each.lora.changes_kernels for each in self.placements)
        return LoraPool.of_columns(rank, kernels=kernels)

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """The LoRAs in the rank pool, each once whatever its scales."""
        pooled = {lora.name: lora for lora in reversed(self.request.loras) if self._is_pooled(lora)}
        loras = tuple(reversed(pooled.values()))
        columns = itertools.count()
        return tuple(Placement(lora, tuple(itertools.islice(columns, lora.rank))) for lora in loras)

    @property
    def merged(self) -> tuple[Lora, ...]:
        """The LoRAs that are merged into further models: those that a rank pool cannot hold."""
        return tuple(lora for lora in self.request.loras if not self._is_pooled(lora))

    def _is_pooled(self, lora: Lora) -> bool:
        pooled = {each.module for each in self.checkpoint.family.components if each.can_have_pool}
        return self.request.dtype not in QUANTIZED and lora.modules <= pooled and lora.is_low_rank

    @cached_property
    def hashes(self) -> ContentHashes:
        """Content hashes, starting with the ones stored by exports beside this one."""
        exports = (*sibling_exports(self.previous.folder), self.previous)
        return ContentHashes({stamp: known for each in exports for stamp, known in each.hashes.items()})

    def variants(self, lora: Lora) -> dict[str, Component]:
        """Component -> its variant with the LoRA merged, for each component that the LoRA changes."""
        return {each.name: each.with_lora(lora) for each in self.own if each.module in lora.modules}

    @property
    def shapes(self) -> Shapes:
        """The shapes that engines are built for."""
        return shapes_of(self.checkpoint, self.sizes, self.rows)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Component -> key of its model file."""
        return {component.name: self._key(component) for component in self.components}

    @cached_property
    def tokenizer_keys(self) -> dict[str, str]:
        """Tokenizer -> key of its file."""
        return {text.tokenizer: tokenizer_key(self.checkpoint, text) for text in self.checkpoint.family.text}

    @cached_property
    def key(self) -> str:
        """Key of the whole repository."""
        stated = {"defaults": self.checkpoint.defaults, "index": self.checkpoint.index}
        settings = self.settings | {name: repr(sorted(given.items())) for name, given in stated.items()}
        # Those in a rank pool are in no component's key.
        loras = [(lora.name, lora.scale, lora.sha256) for lora in self.request.loras]
        settings |= {"sizes": repr(self.sizes), "loras": repr(loras)}
        sources = [self.checkpoint.folder / SCHEDULER, sampler_folder() / "config.pbtxt", *sampler_sources()]
        return repository_key([*self.keys.values(), *self.tokenizer_keys.values()], settings, sources)

    @property
    def is_up_to_date(self) -> bool:
        """Whether the output folder already has this export."""
        same: bool = self.previous.record.get("key") == self.key
        return (
            same
            and self.previous.is_intact("")
            and all(self._has_its_weights(component, self.previous) for component in self.components)
        )

    @cached_property
    def sources(self) -> dict[str, PreviousExport]:
        """Component -> an export with the same model file, if there is one.

        Exports of the same checkpoint with other LoRAs or options are siblings of the output folder. Shared components
        are converted only once. Files are linked or copied, since another export may be in use.
        """
        sources: dict[str, PreviousExport] = {}
        for export in (*sibling_exports(self.previous.folder), self.previous):
            sources |= {each.name: export for each in self.components if self._is_available(each, export)}
        return sources

    @property
    def reused(self) -> list[Component]:
        """Components that a previous export contains."""
        return [component for component in self.components if component.name in self.sources]

    @property
    def outdated(self) -> list[Component]:
        """Components to convert. Those that LoRAs change are first, since only then it shows if a LoRA does not fit."""
        missing = [component for component in self.components if component.name not in self.sources]
        changed = {module for placement in self.placements for module in placement.lora.modules}

        def last(component: Component) -> tuple[bool, bool, bool]:
            is_changed = component.module in changed
            return component.lora is None, not is_changed, not (is_changed and component.is_denoiser)

        return sorted(missing, key=last)

    def recorded(self, component: Component) -> Mapping[str, Any]:
        """A reused component's entry in the record of the export that it comes from."""
        return self.sources[component.name].component(component.name)

    def has_tokenizer(self, name: str) -> bool:
        """Whether the previous export has this tokenizer's file."""
        same: bool = self.previous.record.get("tokenizers", {}).get(name) == self.tokenizer_keys[name]
        return same and self.previous.is_intact(str(tokenizer_file(name)))

    @property
    def bytes_to_write(self) -> int:
        """An estimate: a plan, and weights that are written, are at most as large as the module in float32.

        Quantised ones are at most half of that: eight bits, and layers that are not quantised. Rank pools are written
        for reused components, too.
        """
        return sum(map(self._bytes_of, self.outdated)) + sum(map(self._pool_bytes, self.components))

    def _pool_bytes(self, component: Component) -> int:
        folder, weights = self.checkpoint.folder_of(component.module), self.checkpoint.weights(component.module)
        return float32_pool_bytes(folder, weights, component.pool.rank) if component.pool else 0

    def _bytes_of(self, component: Component) -> int:
        folder, weights = self.checkpoint.folder_of(component.module), self.checkpoint.weights(component.module)
        full = float32_bytes(folder, weights)
        plan = full if self.target else full // 2 if self.is_quantized(component) else 0
        is_linked = weights.format == "safetensors" and not component.lora
        if not is_linked or not (self.target or stored_dtypes(folder, weights) <= {self.weights_dtype(component)}):
            return plan + full
        files = [folder / name for name in weights.files]
        copied = sum(file.stat().st_size for file in files if not on_one_file_system(file, self.previous.folder))
        return plan + copied + min(full, _GRAPH_BYTES)

    def weights_dtype(self, component: Component) -> str:
        """The dtype of the component's ONNX file.

        Unless it is typed, OpenVINO itself converts it when it loads it, and NNCF quantises from float32.
        """
        if self.target is None and (self.is_quantized(component) or not component.is_typed):
            return "float32"
        return component.weights_dtype(self.request.dtype)

    def is_quantized(self, component: Component) -> bool:
        """Whether the component is quantised, not served in its ONNX file."""
        return component.is_quantized(self.request.dtype)

    def _key(self, component: Component) -> str:
        dtype = self.weights_dtype(component) if self.target is None else "float32"
        key = component_key(self.checkpoint, component, self.hashes, dtype)
        if self.is_quantized(component):
            key = quantized_key(key, self.request.dtype, *self._calibration)
        if self.target is None:
            return key
        # A rank pool's weights are inside the plan.
        shapes, pooled = profiles(component, self.shapes), pool_parts(self.placements) if component.pool else []
        return plan_key(key, self.weights_dtype(component), self.target, shapes, *pooled)

    @cached_property
    def _calibration(self) -> list[Any]:
        """What ranges of activations depend on, beside the component itself."""
        if self.request.dtype not in CALIBRATED:
            return []
        encoders = [self._key(encoder) for encoder in self.checkpoint.family.text_encoders]
        # Defaults also follow from the checkpoint's names, which no file of a component has.
        limits = checkpoint_parameters(self.checkpoint)
        defaults = {name: limits[name] for name in _CALIBRATING}
        return [encoders, self.tokenizer_keys, dict(self.checkpoint.scheduler), defaults]

    def _is_available(self, component: Component, export: PreviousExport) -> bool:
        same: bool = export.component(component.name).get("key") == self.keys[component.name]
        return same and export.is_intact(f"{component.name}/1/") and self._has_its_weights(component, export)

    def _has_its_weights(self, component: Component, export: PreviousExport) -> bool:
        """Whether the linked weights are unchanged: writing to the checkpoint's file writes to the export's, too."""
        folder = version_folder(export.folder, component)
        linked = export.component(component.name).get("weights", {})
        return all(self.hashes(folder / name) == digest for name, digest in linked.items())

    def linked_weights(self, component: Component, repository: Path) -> dict[str, str]:
        """The checkpoint's files that a converted component links: name -> hash."""
        folder = version_folder(repository, component)
        files = weight_files(self.checkpoint, component.module)
        return {file.name: self.hashes(file) for file in files if (folder / file.name).is_file()}
