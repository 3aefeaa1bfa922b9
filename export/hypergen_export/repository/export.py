"""Export a checkpoint to a Triton repository, reusing what previous exports have converted.

torch is not imported before the first conversion, so an export that is up to date takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypergen_export.checkpoints.checkpoint import (
    SCHEDULER,
    Checkpoint,
    Replacement,
    check_pipeline,
    find_folder,
    open_checkpoint,
    read_json,
)
from hypergen_export.checkpoints.components import CALIBRATED, INT8, QUANTIZED, Component, LoraPool
from hypergen_export.checkpoints.defaults import (
    checkpoint_parameters,
    notices,
)
from hypergen_export.checkpoints.embeddings import Embedding
from hypergen_export.checkpoints.families.tensors import PREVIEW_DECODER
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.checkpoints.family import TextInput
from hypergen_export.checkpoints.files import link_or_copy, on_one_file_system
from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.checkpoints.lora import Lora, Placement
from hypergen_export.checkpoints.weights import float32_bytes, float32_pool_bytes, stored_dtypes
from hypergen_export.engines.engine import (
    ENGINES,
    OPENVINO,
    TENSORRT,
    Size,
    check_dtype,
    check_family,
    check_lora_rank,
    choose_sizes,
    size_parameters,
)
from hypergen_export.engines.memory import Model
from hypergen_export.engines.profiles import Shapes, profiles, reference_rows, shapes_of
from hypergen_export.engines.tensorrt import Build, Target, build_plan, local_target, onnx_files, write_plan_record
from hypergen_export.errors import (
    BadEmbeddingError,
    BadLoraError,
    BadOptionError,
    BrokenCheckpointError,
    MissingDependencyError,
)
from hypergen_export.repository.cache_key import (
    component_key,
    plan_key,
    pool_parts,
    quantized_key,
    repository_key,
    tokenizer_key,
    weight_files,
)
from hypergen_export.repository.estimate import table
from hypergen_export.repository.replacements import (
    clip_of,
    encoders_of,
    file_replacements,
    find_configs,
    preview_vae,
    split_text_encoders,
    text_replacements,
    vae_replacement,
)
from hypergen_export.repository.single_file import (
    SingleFileOptions,
    convert_once,
    convert_transformer_once,
    is_single_file,
)
from hypergen_export.repository.staging import (
    PreviousExport,
    check_space,
    file_sizes,
    read_record,
    sibling_exports,
    staged,
    update_record,
    write_record,
)

if TYPE_CHECKING:
    from hypergen_export.conversion.convert import Finish, Job
    from hypergen_export.conversion.parity import Parity

_PACKAGE = Path(__file__).parents[1]
# The sampler is inside the package in a wheel, and in model_repository in a source checkout.
_SAMPLER_FOLDERS = (_PACKAGE / "bundled" / "diffusion", _PACKAGE.parents[1] / "model_repository" / "diffusion")
_SAMPLER = "diffusion"
_SCHEDULERS = "schedulers.json"
_VERSIONS = ("hypergen-triton", "torch", "diffusers", "transformers", "onnx", "openvino")
_ONNX = "model.onnx"
# An ONNX file without its large weights.
_GRAPH_BYTES = 64 * 2**20
_STAGES_PER_COMPONENT = 4  # and one more if a plan is built
# Quality already drops above about five.
_MAX_CACHE_INTERVAL = 10
# Defaults of the images that ranges of activations are taken from.
_CALIBRATING = (
    "default_num_inference_steps",
    "default_guidance_scale",
    "default_width",
    "default_height",
    "suggestions",
    "zeros_for_no_negative_prompt",
)
# Rows of a denoiser call that one image takes with skip-layer guidance.
_ROWS_SKIPPING_LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The options of an export. `max_batch_size` counts images; with guidance each takes several rows of a call.

    `sizes` are the image sizes to build, for engines that need them; empty for the checkpoint's default. `loras` are
    served beside the unmodified checkpoint; `lora_rank` is the least number of columns of the rank pool, for more LoRAs
    while serving. `deep_cache` adds a shallow UNet, for requests with `cache_interval`.
    `single_files` applies if `model` or another part is a single file. `vae` and `text_encoders`, a pipeline and files
    of single ones, replace the checkpoint's own. `preview_vae` decodes previews. `embeddings` are textual inversions
    that prompts may name.
    """

    model: str
    output: Path
    engine: str = OPENVINO.name
    dtype: str = "float32"
    max_batch_size: int = 8
    sizes: tuple[Size, ...] = ()
    model_id: str = ""
    loras: tuple[Lora, ...] = ()
    lora_rank: int = 0
    deep_cache: bool = False
    single_files: SingleFileOptions = field(default_factory=SingleFileOptions)
    vae: str | None = None
    preview_vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def source(self) -> dict[str, Any]:
        """What decides the images, apart from the engine: options with which the same can be exported in float32."""
        return {
            "model": _absolute(self.model),
            "vae": self.vae and _absolute(self.vae),
            "text_encoders": [_absolute(each) for each in self.text_encoders],
            "prediction_type": self.single_files.prediction_type,
            "embeddings": [f"{each.name}={each.file.absolute()}" for each in self.embeddings],
        }

    @property
    def settings(self) -> dict[str, str]:
        """The sampler's parameters that depend on the request alone."""
        return {
            "model_id": self.model_id or self.model,
            "engine": self.engine,
            "dtype": self.dtype,
            "device": ENGINES[self.engine].device,
            "embeddings": ",".join(embedding.name for embedding in self.embeddings),
            "max_cache_interval": str(_MAX_CACHE_INTERVAL if self.deep_cache else 1),
        }


def _absolute(place: str) -> str:
    """A path that is valid in any folder; ids of the hub stay as they are."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The converted and the reused components; both are empty if everything was up to date."""

    converted: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()


def export(
    request: ExportRequest,
    target: Target | None = None,
    notify: Callable[[str], None] = lambda _: None,
    examine: Callable[[Path], None] = lambda _: None,
) -> ExportResult:
    """Write the Triton repository at `request.output`, unless it is up to date. Raises ExportError.

    TensorRT plans are built for `target`, by default for this machine. `notify` is called with each notice about the
    checkpoint; `examine` with the complete repository before it is put in place, which it prevents by an ExportError.
    """
    output = request.output.expanduser().resolve()
    task = _make_task(request, PreviousExport(output, read_record(output) or {}), target, notify)
    for text in notices(task.checkpoint):
        notify(text)
    _hash_weights(task)
    if task.is_up_to_date:
        # The same content may lie elsewhere now.
        made_of = {"model": request.model, "source": request.source}
        if task.hashes.has_new_hashes or not made_of.items() <= task.previous.record.items():
            update_record(output, {**task.previous.record, **made_of, "hashes": task.hashes.stored})
        examine(output)
        return ExportResult()
    if task.target is None and any(map(task.is_quantized, task.outdated)):
        with _requires_export_extra():
            from hypergen_export.engines.quantization import require_nncf
        require_nncf(request.dtype)
    check_space(output, task.bytes_to_write)
    for text in _estimate(task):
        notify(text)
    with staged(output) as folder:
        parity = _write_repository(task, folder)
        record = _record(task, folder, parity)
        write_record(folder, record)
        for name in (each.name for each in task.outdated if task.is_quantized(each)):
            error, limit = parity[name]["difference"], parity[name]["tolerance"]
            notify(f"{name} in {request.dtype} differs from float32 by {error:.2g} of its output (limit {limit:g})")
        examine(folder)
    # Linking the weights, here and in an export that was replaced, has changed their files' change times.
    if task.hashes.renew():
        update_record(output, {**(read_record(output) or record), "hashes": task.hashes.stored})
    reused = tuple(component.name for component in task.reused)
    return ExportResult(converted=tuple(component.name for component in task.outdated), reused=reused)


def _estimate(task: ExportTask) -> Iterator[str]:
    """The GPU memory of the engines that are going to be built, where the weights' files state it."""
    if task.target is None or any(task.checkpoint.weights(each.module).format != "safetensors" for each in task.own):
        return iter(())
    return table(Model(checkpoint=task.checkpoint, components=task.components, dtype=task.request.dtype), task.shapes)


def _hash_weights(task: ExportTask) -> None:
    """Hash the weights whose hashes no export has stored: many gigabytes, so with progress."""
    files = [file for module in task.checkpoint.family.modules for file in weight_files(task.checkpoint, module)]
    unknown = task.hashes.unknown(files)
    if unknown:
        with _requires_export_extra():
            from hypergen_export.conversion.progress import Progress
        with contextlib.closing(Progress(1)) as progress, progress.stage("weights: hash") as report:
            task.hashes.read(unknown, report)


def _make_task(
    request: ExportRequest, previous: PreviousExport, target: Target | None, notify: Callable[[str], None]
) -> ExportTask:
    """The task of a request. Options are checked here, before any work is done, the cheapest check first."""
    engine = ENGINES[request.engine]
    check_dtype(engine, request.dtype)
    checkpoint = replace(open_request(request, notify), embeddings=request.embeddings)
    _check_embeddings(request, checkpoint)
    request = replace(request, loras=tuple(replace(lora, t5=checkpoint.family.t5) for lora in request.loras))
    _check_loras(request, checkpoint)
    if request.deep_cache and checkpoint.family.denoiser.module != "unet":
        raise BadOptionError(f"--deep-cache: only for models with a UNet, and {request.model} has a transformer")
    check_family(engine, request.dtype, checkpoint.family)
    check_lora_rank(request.dtype, request.lora_rank)
    if request.deep_cache and request.dtype in CALIBRATED:
        raise BadOptionError(
            f"--deep-cache: not with --dtype {request.dtype}; use it with bfloat16, or fewer steps with {request.dtype}"
        )
    sizes = choose_sizes(engine, request.sizes, checkpoint_parameters(checkpoint))
    if engine is OPENVINO:
        return ExportTask(checkpoint, request, previous, sizes, None)
    target = target or local_target()
    target.check_dtype(request.dtype)
    return ExportTask(checkpoint, request, previous, sizes, target)


def open_request(request: ExportRequest, notify: Callable[[str], None]) -> Checkpoint:
    """The checkpoint, converted from a single file if it is one, with the parts that replace its own.

    Raises ExportError.
    """
    if is_single_file(request.model):
        with _requires_export_extra():
            return _open_single_file(request, notify)
    if request.single_files.prediction_type:
        raise BadOptionError("--prediction-type: only for single files; a folder's scheduler says it")
    return open_checkpoint(request.model, _replacements(request, notify))


def _open_single_file(request: ExportRequest, notify: Callable[[str], None]) -> Checkpoint:
    pipeline, files = split_text_encoders(request.text_encoders)
    if pipeline and (find_configs(pipeline) / "transformer" / "config.json").is_file():
        return _open_transformer(request, pipeline, files, notify)
    own = encoders_of(find_configs(pipeline)) if pipeline and files else None
    converted = convert_once(request.model, request.single_files, notify)
    replaced = file_replacements(files, lambda file: own or clip_of(file, converted), request.single_files, notify)
    if pipeline:
        replaced = text_replacements(pipeline, replaced)
    if request.vae:
        replaced["vae"] = vae_replacement(request.vae, converted.vae, request.single_files, notify)
    absent = [module for module in converted.missing if module not in replaced]
    if absent:
        option = "--vae" if absent == ["vae"] else "--text-encoder"
        raise BrokenCheckpointError(f"{request.model}: it has no {' and no '.join(absent)}: see {option}")
    return open_checkpoint(str(converted.folder), replaced | _preview_vae(request, notify))


def _open_transformer(
    request: ExportRequest, pipeline: str, files: tuple[Path, ...], notify: Callable[[str], None]
) -> Checkpoint:
    """A transformer's file with the rest of a pipeline, of which parts that are given as files need no weights."""
    if request.single_files.prediction_type:
        raise BadOptionError("--prediction-type: only for models with a UNet; a transformer's pipeline says it")
    base = find_configs(pipeline)
    check_pipeline(pipeline, base)
    replaced = file_replacements(files, lambda _: encoders_of(base), request.single_files, notify)
    replaced |= _vae(request, base, notify)
    config = read_json(base / "transformer" / "config.json")
    folder = convert_transformer_once(request.model, config, request.single_files, notify)
    replaced["transformer"] = Replacement(folder=folder, loader=f"diffusers.{config['_class_name']}")
    rest = find_folder(pipeline, lambda module: module not in replaced)
    return open_checkpoint(str(rest), replaced | _preview_vae(request, notify))


def _replacements(request: ExportRequest, notify: Callable[[str], None]) -> dict[str, Replacement]:
    """The parts of a folder or hub id that are replaced."""
    pipeline, files = split_text_encoders(request.text_encoders)
    replaced: dict[str, Replacement] = {}
    if files or request.vae:
        check_pipeline(request.model, find_configs(request.model))
    with _requires_export_extra():
        if files:
            own = encoders_of(find_configs(pipeline or request.model))
            replaced = file_replacements(files, lambda _: own, request.single_files, notify)
        if pipeline:
            replaced = text_replacements(pipeline, replaced)
        if request.vae:
            replaced |= _vae(request, find_configs(request.model), notify)
    return replaced | _preview_vae(request, notify)


def _vae(request: ExportRequest, configs: Path, notify: Callable[[str], None]) -> dict[str, Replacement]:
    """The VAE that replaces that of the pipeline whose configurations are in `configs`."""
    if not request.vae:
        return {}
    own = read_json(configs / "vae" / "config.json")
    return {"vae": vae_replacement(request.vae, own, request.single_files, notify)}


def _preview_vae(request: ExportRequest, notify: Callable[[str], None]) -> dict[str, Replacement]:
    if not request.preview_vae:
        return {}
    with _requires_export_extra():
        return {PREVIEW_DECODER.module: preview_vae(request.preview_vae, request.single_files, notify)}


def _check_embeddings(request: ExportRequest, checkpoint: Checkpoint) -> None:
    if not request.embeddings or max(text.max_chunks for text in checkpoint.family.text) > 1:
        return
    for embedding in request.embeddings:
        if embedding.is_bundled:
            raise BadEmbeddingError(
                f"{embedding.file}: teaches the word {embedding.name}, but only models with CLIP alone learn words, "
                f"and {request.model} has another text encoder"
            )
    raise BadOptionError(f"--embedding: only for models with CLIP alone, and {request.model} has another text encoder")


def _check_loras(request: ExportRequest, checkpoint: Checkpoint) -> None:
    for lora in request.loras:
        unknown = sorted(lora.modules - checkpoint.family.modules.keys())
        if unknown:
            raise BadLoraError(f"{lora.file}: changes {unknown[0]}, which {request.model} does not have{lora.made_for}")


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


def version_folder(repository: Path, component: Component) -> Path:
    """The folder of version 1 of a component."""
    return repository / component.name / "1"


def tokenizer_file(name: str) -> Path:
    """Path of a tokenizer's file in a repository."""
    return Path(_SAMPLER) / f"{name}.json"


def sampler_folder() -> Path:
    """The folder of the sampler: its config.pbtxt is a template, the files of its version are copied."""
    return next((folder for folder in _SAMPLER_FOLDERS if folder.is_dir()), _SAMPLER_FOLDERS[-1])


def sampler_sources() -> list[Path]:
    """The sampler's Python files."""
    return sorted((sampler_folder() / "1").rglob("*.py"))


def _write_repository(task: ExportTask, folder: Path) -> dict[str, Any]:
    """Write everything but the record to `folder`; returns the parity of each converted component."""
    for component in task.components:
        version_folder(folder, component).mkdir(parents=True)
    (folder / _SAMPLER / "1").mkdir(parents=True)
    for component in task.reused:
        for file in version_folder(task.sources[component.name].folder, component).iterdir():
            link_or_copy(file, version_folder(folder, component) / file.name)
    if task.target is None:
        _fill_pools(task, folder)
    for text in task.checkpoint.family.text:
        _write_tokenizer(task, text, folder)
    _write_configs(task, folder)
    for source in sampler_sources():
        copy = folder / _SAMPLER / source.relative_to(sampler_folder())
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    return _convert(task, folder) if task.outdated else {}


def _fill_pools(task: ExportTask, folder: Path) -> None:
    """Write the LoRAs' weights to the pools of reused components. Raises BadLoraError."""
    pooled = [component for component in task.reused if component.pool]
    if not pooled:
        return
    with _requires_export_extra():
        from hypergen_export.conversion.pooling import PoolWeights

    for component in pooled:
        PoolWeights(version_folder(folder, component)).fill(task.placements)


def _write_configs(task: ExportTask, folder: Path) -> None:
    with _requires_export_extra():
        from hypergen_export.conversion.tokenizer import text_parameters
        from hypergen_export.repository.config_pbtxt import EngineOptions, component_config, sampler_config

    request = task.request
    template = (sampler_folder() / "config.pbtxt").read_text(encoding="utf-8")
    tokenizers = {name: folder / tokenizer_file(name) for name in task.checkpoint.family.tokenizers}
    own = checkpoint_parameters(task.checkpoint) | text_parameters(task.checkpoint, tokenizers, task.pool)
    own |= _write_schedulers(task.checkpoint, int(own["default_num_inference_steps"]), folder)
    default_size = int(own["default_width"]), int(own["default_height"])
    options = EngineOptions(engine=request.engine, dtype=request.dtype, shapes=task.shapes, default_size=default_size)
    for component in task.components:
        text = component_config(component, options)
        (folder / component.name / "config.pbtxt").write_text(text, encoding="utf-8")
    if task.shapes.rows < _ROWS_SKIPPING_LAYERS:
        own |= dict.fromkeys(("default_skip_layer_guidance_scale", "max_skip_layer_guidance_scale"), "0")
    if task.pool:
        own["denoiser_inputs"] += f",{task.pool.scales.name}"
    own |= size_parameters(task.sizes, own) | {"max_reference_rows": str(reference_rows(task.shapes))}
    parameters = task.settings | own | _lora_parameters(task) | {"export_key": task.key}
    (folder / _SAMPLER / "config.pbtxt").write_text(sampler_config(template, parameters), encoding="utf-8")


def _write_schedulers(checkpoint: Checkpoint, steps: int, folder: Path) -> dict[str, str]:
    """Write the sampler's table of schedulers; returns the parameters that describe it."""
    with _requires_export_extra():
        from hypergen_export.checkpoints.schedulers import checkpoint_schedulers

    table = checkpoint_schedulers(checkpoint, steps)
    (folder / _SAMPLER / _SCHEDULERS).write_text(json.dumps(asdict(table), indent=1), encoding="utf-8")
    return {"schedulers": ",".join(table.names), "default_scheduler": table.own_name}


def _lora_parameters(task: ExportTask) -> dict[str, str]:
    """The sampler's parameters for LoRAs: columns of the rank pool or models, and the names of all component models."""
    pooled = [
        {
            "name": placement.lora.name,
            "scale": placement.lora.scale,
            "columns": placement.columns,
            "changes": sorted(placement.lora.modules),
        }
        for placement in task.placements
    ]
    merged = [
        {
            "name": lora.name,
            "scale": lora.scale,
            "models": {component: variant.name for component, variant in task.variants(lora).items()},
        }
        for lora in task.merged
    ]
    return {
        "loras": json.dumps(pooled + merged),
        "lora_rank": str(task.pool.rank if task.pool else 0),
        "components": ",".join(component.name for component in task.components),
    }


def _write_tokenizer(task: ExportTask, text: TextInput, folder: Path) -> None:
    with _requires_export_extra():
        from hypergen_export.conversion.tokenizer import write_tokenizer

        file = tokenizer_file(text.tokenizer)
        if task.has_tokenizer(text.tokenizer):
            link_or_copy(task.previous.folder / file, folder / file)
        else:
            write_tokenizer(task.checkpoint, text, folder / file)


def _convert(task: ExportTask, folder: Path) -> dict[str, Any]:
    with _requires_export_extra():
        from hypergen_export.conversion.convert import Job, convert
        from hypergen_export.conversion.progress import Progress

    jobs = [
        Job(
            component=component,
            dtype=task.weights_dtype(component),
            onnx=version_folder(folder, component) / _ONNX,
            placements=task.placements,
            finish=_finish(task, component),
        )
        for component in task.outdated
    ]
    progress = Progress(sum(_STAGES_PER_COMPONENT + bool(job.finish) for job in jobs))
    with contextlib.closing(progress):
        parity = convert(task.checkpoint, jobs, progress)
    return {name: asdict(entry) for name, entry in parity.items()}


def _finish(task: ExportTask, component: Component) -> Finish | None:
    """How the engine of a component is built; None if its ONNX file is served."""
    if task.target:
        return functools.partial(_build_quantized if task.is_quantized(component) else _build, task, task.target)
    return functools.partial(_quantize, task) if task.is_quantized(component) else None


def _quantize(task: ExportTask, job: Job, report: Callable[[float], None]) -> Parity:
    """Replace a component's ONNX file with its quantised graph."""
    from hypergen_export.engines.calibration import denoiser_calls, example_calls
    from hypergen_export.engines.quantization import quantize

    component, dtype = job.component, task.request.dtype
    if dtype != INT8:
        return quantize(component, dtype, job.onnx, example_calls(component, task.checkpoint.sizes), report)
    # Generating the images takes about half of the time.
    calls = denoiser_calls(task.checkpoint, component, job.onnx, lambda share: report(share / 2))
    return quantize(component, dtype, job.onnx, calls, lambda share: report(0.5 + share / 2))


def _build_quantized(task: ExportTask, target: Target, job: Job, report: Callable[[float], None]) -> Parity:
    """Let a component's ONNX file state what is computed in eight bits, then replace it with its plan."""
    from hypergen_export.engines.accuracy import check_error
    from hypergen_export.engines.qdq import quantize_graph
    from hypergen_export.engines.ranges import measure_ranges

    component, dtype = job.component, task.request.dtype
    # Generating the images takes about half of the time.
    ranges = measure_ranges(task.checkpoint, component, dtype, lambda share: report(share / 2))
    parity = check_error(component, dtype, ranges.error)
    quantize_graph(component, job.onnx, dtype, ranges.magnitudes)
    _build(task, target, job, lambda share: report(0.5 + share / 2))
    return parity


def _build(task: ExportTask, target: Target, job: Job, report: Callable[[float], None]) -> None:
    """Replace a component's ONNX file with its plan and the plan's record."""
    build = Build(
        name=job.component.name,
        onnx=job.onnx,
        dtype=task.request.dtype if task.is_quantized(job.component) else job.dtype,
        plan=job.onnx.with_name(TENSORRT.file),
        profiles=profiles(job.component, task.shapes),
        target=target,
    )
    write_plan_record(build, build_plan(build, report))
    for file in onnx_files(job.onnx):
        file.unlink()


@contextlib.contextmanager
def _requires_export_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; an export needs: pip install 'hypergen-triton[export]'"
        ) from error


def _record(task: ExportTask, folder: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": task.key,
        "model": task.request.model,
        "source": task.request.source,
        **task.settings,
        "target": asdict(task.target) if task.target else None,
        "versions": _versions(),
        "components": {
            component.name: {
                "key": task.keys[component.name],
                "parity": parity.get(component.name) or task.recorded(component)["parity"],
                "weights": task.linked_weights(component, folder),
            }
            for component in task.components
        },
        "tokenizers": task.tokenizer_keys,
        "loras": [{"name": lora.name, "scale": lora.scale, "sha256": lora.sha256} for lora in task.request.loras],
        "hashes": task.hashes.stored,
        "files": file_sizes(folder),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
