"""An export from MODEL to a repository in its place: what must be made, what an earlier export already holds.

It decides and arranges. Everything up to the first conversion works without torch, so that finding out that nothing
is to be done costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypergen_export.checkpoints.checkpoint import SCHEDULER, Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import Component, with_deep_cache
from hypergen_export.checkpoints.defaults import checkpoint_parameters, remarks
from hypergen_export.checkpoints.hashes import ContentHashes
from hypergen_export.checkpoints.lora import Lora
from hypergen_export.checkpoints.weights import float32_bytes
from hypergen_export.engines.engine import ENGINES, OPENVINO, TENSORRT, Size, check_dtype, choose_sizes, size_parameters
from hypergen_export.engines.profiles import Shapes, profiles
from hypergen_export.engines.tensorrt import Build, Target, build_plan, this_machine, write_plan_record
from hypergen_export.errors import BadLoraError, MissingDependencyError
from hypergen_export.repository.cache_key import component_key, plan_key, repository_key, tokenizer_key, weight_files
from hypergen_export.repository.staging import (
    PreviousExport,
    check_space,
    exports_beside,
    file_sizes,
    link_or_copy,
    read_record,
    remember,
    staged,
    write_record,
)

if TYPE_CHECKING:
    from hypergen_export.conversion.convert import Job

_PACKAGE = Path(__file__).parents[1]
# In a wheel the sampler lies inside the package, in a checkout in its own folder.
_SAMPLER_FOLDERS = (_PACKAGE / "bundled" / "diffusion", _PACKAGE.parents[1] / "model_repository" / "diffusion")
_SAMPLER = "diffusion"
_SCHEDULERS = "schedulers.json"
_VERSIONS = ("hypergen-triton", "torch", "diffusers", "transformers", "onnx", "openvino")
_ONNX = "model.onnx"
_STAGES_PER_COMPONENT = 4  # and one more where a plan is built
# DeepCache loses much beyond five steps or so already.
_MAX_CACHE_INTERVAL = 10


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is asked for. `max_batch_size` counts images; guidance gives each of them two rows in a UNet call.

    `sizes` are pictures' widths and heights, for an engine that must know them; empty: the checkpoint's own.
    `loras` are served beside the checkpoint as it is. `deep_cache`: requests may ask for deep features to be reused.
    """

    model: str
    output: Path
    engine: str = OPENVINO.name
    dtype: str = "float32"
    max_batch_size: int = 8
    sizes: tuple[Size, ...] = ()
    model_id: str = ""
    loras: tuple[Lora, ...] = ()
    deep_cache: bool = False

    @property
    def rows(self) -> int:
        """The largest batch of a component."""
        return 2 * self.max_batch_size

    @property
    def settings(self) -> dict[str, str]:
        """The parameters of the sampler that follow from the request alone."""
        return {
            "model_id": self.model_id or self.model,
            "engine": self.engine,
            "dtype": self.dtype,
            "device": ENGINES[self.engine].device,
            "max_batch_size": str(self.rows),
            "max_cache_interval": str(_MAX_CACHE_INTERVAL if self.deep_cache else 1),
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an export did: the components it converted and those it took over. Neither: all was up to date."""

    converted: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()


def export(
    request: ExportRequest, target: Target | None = None, remark: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Make `request.output` the repository asked for. Raises ExportError.

    TensorRT's plans are for `target`, or for this machine. `remark` is told what one should know of the checkpoint.
    """
    output = request.output.expanduser().resolve()
    plan = _plan(request, PreviousExport(output, read_record(output) or {}), target)
    for text in remarks(plan.checkpoint):
        remark(text)
    _hash_weights(plan)
    if plan.is_up_to_date:
        if plan.hashes.has_news:
            remember(output, {**plan.earlier.record, "hashes": plan.hashes.remembered})
        return Outcome()
    check_space(output, plan.bytes_to_write)
    with staged(output) as folder:
        parity = _fill(plan, folder)
        write_record(folder, _record(plan, folder, parity))
    reused = tuple(component.name for component in plan.reused)
    return Outcome(converted=tuple(component.name for component in plan.outdated), reused=reused)


def _hash_weights(plan: ExportTask) -> None:
    """Read what no earlier export knows by its content: many gigabytes, so with progress."""
    files = [file for module in plan.checkpoint.family.modules for file in weight_files(plan.checkpoint, module)]
    unknown = plan.hashes.unknown(files)
    if unknown:
        with _needs_the_extra():
            from hypergen_export.conversion.progress import Progress
        with contextlib.closing(Progress(1)) as progress, progress.stage("weights: hash") as report:
            plan.hashes.read(unknown, report)


def _plan(request: ExportRequest, earlier: PreviousExport, target: Target | None) -> ExportTask:
    """Everything that can be refused before anything is done, is refused here, what costs least first."""
    engine = ENGINES[request.engine]
    check_dtype(engine, request.dtype)
    checkpoint = open_checkpoint(request.model)
    _check_loras(request, checkpoint)
    sizes = choose_sizes(engine, request.sizes, checkpoint_parameters(checkpoint))
    if engine is OPENVINO:
        return ExportTask(checkpoint, request, earlier, sizes, None)
    target = target or this_machine()
    target.check_dtype(request.dtype)
    return ExportTask(checkpoint, request, earlier, sizes, target)


def _check_loras(request: ExportRequest, checkpoint: Checkpoint) -> None:
    for lora in request.loras:
        strange = sorted(lora.modules - checkpoint.family.modules.keys())
        if strange:
            raise BadLoraError(f"{lora.file}: changes {strange[0]}, which {request.model} does not have")


@dataclass(frozen=True)
class ExportTask:
    """A request held against the export that is already there (one without a record where none is).

    `sizes` are those that are built in, empty for an engine that takes any; `target` is what TensorRT builds for.
    """

    checkpoint: Checkpoint
    request: ExportRequest
    earlier: PreviousExport
    sizes: tuple[Size, ...]
    target: Target | None

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The checkpoint's own, then for each LoRA those that it changes."""
        variants = (variant for lora in self.request.loras for variant in self.variants(lora).values())
        return (*self.own, *variants)

    @cached_property
    def own(self) -> tuple[Component, ...]:
        """Those of the checkpoint as it is."""
        components = self.checkpoint.family.components
        return with_deep_cache(components) if self.request.deep_cache else components

    @cached_property
    def hashes(self) -> ContentHashes:
        """The checkpoint's files by their content."""
        exports = (*exports_beside(self.earlier.folder), self.earlier)
        return ContentHashes({stamp: known for each in exports for stamp, known in each.hashes.items()})

    def variants(self, lora: Lora) -> dict[str, Component]:
        """Component -> what takes its place under the LoRA, for those that it changes."""
        return {each.name: each.with_lora(lora) for each in self.own if each.module in lora.modules}

    @property
    def shapes(self) -> Shapes:
        """What the engines are for."""
        return Shapes(sizes=self.checkpoint.sizes, pictures=self.sizes, rows=self.request.rows)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Component -> key of the file that its engine loads."""
        return {component.name: self._key(component) for component in self.components}

    @cached_property
    def tokenizer_keys(self) -> dict[str, str]:
        """Tokenizer -> key of its file."""
        return {name: tokenizer_key(self.checkpoint, name) for name in self.checkpoint.family.tokenizers}

    @cached_property
    def key(self) -> str:
        """Key of the whole repository."""
        stated = {"defaults": self.checkpoint.defaults, "index": self.checkpoint.index}
        settings = self.request.settings | {name: repr(sorted(given.items())) for name, given in stated.items()}
        settings |= {"sizes": repr(self.sizes)}
        sources = [self.checkpoint.folder / SCHEDULER, sampler_folder() / "config.pbtxt", *sampler_sources()]
        return repository_key([*self.keys.values(), *self.tokenizer_keys.values()], settings, sources)

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        same: bool = self.earlier.record.get("key") == self.key
        return same and self.earlier.is_intact("")

    @cached_property
    def sources(self) -> dict[str, PreviousExport]:
        """Component -> an export that has its file, for those of which there is one.

        Beside the place of this one lie those of the same checkpoint with other LoRAs or options: what they have in
        common is converted once, and no export takes away what another, which may be served just now, still needs.
        """
        sources: dict[str, PreviousExport] = {}
        for export in (*exports_beside(self.earlier.folder), self.earlier):
            sources |= {each.name: export for each in self.components if self._is_held(each, export)}
        return sources

    @property
    def reused(self) -> list[Component]:
        """Components that an earlier export has."""
        return [component for component in self.components if component.name in self.sources]

    @property
    def outdated(self) -> list[Component]:
        """Components to convert; those with a LoRA first, for whether it fits shows when it is merged."""
        missing = (component for component in self.components if component.name not in self.sources)
        return sorted(missing, key=lambda component: component.lora is None)

    def recorded(self, component: Component) -> Mapping[str, Any]:
        """What the export that a reused component comes from says of it."""
        return self.sources[component.name].component(component.name)

    def holds_tokenizer(self, name: str) -> bool:
        """Whether the earlier export has this tokenizer's file."""
        same: bool = self.earlier.record.get("tokenizers", {}).get(name) == self.tokenizer_keys[name]
        return same and self.earlier.is_intact(str(tokenizer_file(name)))

    @property
    def bytes_to_write(self) -> int:
        """An estimate: a component's ONNX is at most as large as its module in float32, and a plan as its ONNX."""
        folder = self.checkpoint.folder
        files = 2 if self.target else 1
        return sum(float32_bytes(folder / c.module, self.checkpoint.weights(c.module)) * files for c in self.outdated)

    def weights_dtype(self, component: Component) -> str:
        """The type of the weights in the component's ONNX. OpenVINO lowers them itself when it loads them."""
        return component.weights_dtype(self.request.dtype) if self.target else "float32"

    def _key(self, component: Component) -> str:
        key = component_key(self.checkpoint, component, self.hashes)
        if self.target is None:
            return key
        return plan_key(key, self.weights_dtype(component), self.target, profiles(component, self.shapes))

    def _is_held(self, component: Component, export: PreviousExport) -> bool:
        same: bool = export.component(component.name).get("key") == self.keys[component.name]
        return same and export.is_intact(f"{component.name}/1/")


def version_folder(repository: Path, component: Component) -> Path:
    """Where Triton looks for version 1 of a component."""
    return repository / component.name / "1"


def tokenizer_file(name: str) -> Path:
    """Where in a repository the sampler looks for a tokenizer."""
    return Path(_SAMPLER) / f"{name}.json"


def sampler_folder() -> Path:
    """The sampler model: its config.pbtxt is the template, its version's files are copied."""
    return next((folder for folder in _SAMPLER_FOLDERS if folder.is_dir()), _SAMPLER_FOLDERS[-1])


def sampler_sources() -> list[Path]:
    """The sampler's Python files."""
    return sorted((sampler_folder() / "1").rglob("*.py"))


def _fill(plan: ExportTask, folder: Path) -> dict[str, Any]:
    """Write everything but the record into `folder`; returns component -> parity of those converted."""
    for component in plan.components:
        version_folder(folder, component).mkdir(parents=True)
    (folder / _SAMPLER / "1").mkdir(parents=True)
    for component in plan.reused:
        _take_over(version_folder(plan.sources[component.name].folder, component), version_folder(folder, component))
    _write_configs(plan, folder)
    for source in sampler_sources():
        copy = folder / _SAMPLER / source.relative_to(sampler_folder())
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    for tokenizer in plan.checkpoint.family.tokenizers:
        _put_tokenizer(plan, tokenizer, folder)
    return _convert(plan, folder) if plan.outdated else {}


def _write_configs(plan: ExportTask, folder: Path) -> None:
    with _needs_the_extra():
        from hypergen_export.repository.config_pbtxt import EngineOptions, component_config, sampler_config

    request = plan.request
    template = (sampler_folder() / "config.pbtxt").read_text(encoding="utf-8")
    own = checkpoint_parameters(plan.checkpoint)
    own |= _write_schedulers(plan.checkpoint, int(own["default_num_inference_steps"]), folder)
    usual_size = int(own["default_width"]), int(own["default_height"])
    options = EngineOptions(engine=request.engine, dtype=request.dtype, shapes=plan.shapes, usual_size=usual_size)
    for component in plan.components:
        text = component_config(component, options)
        (folder / component.name / "config.pbtxt").write_text(text, encoding="utf-8")
    parameters = request.settings | own | size_parameters(plan.sizes, own) | _lora_parameters(plan)
    (folder / _SAMPLER / "config.pbtxt").write_text(sampler_config(template, parameters), encoding="utf-8")


def _write_schedulers(checkpoint: Checkpoint, steps: int, folder: Path) -> dict[str, str]:
    """Write the table that the sampler makes its schedulers from; returns its parameters."""
    with _needs_the_extra():
        from hypergen_export.checkpoints.schedulers import checkpoint_schedulers

    table = checkpoint_schedulers(checkpoint, steps)
    (folder / _SAMPLER / _SCHEDULERS).write_text(json.dumps(asdict(table), indent=1), encoding="utf-8")
    return {"schedulers": ",".join(table.names), "default_scheduler": table.own_name}


def _lora_parameters(plan: ExportTask) -> dict[str, str]:
    """The LoRAs by name and scale, and which models take the components' places; all models that are called."""
    loras = [
        {
            "name": lora.name,
            "scale": lora.scale,
            "models": {component: variant.name for component, variant in plan.variants(lora).items()},
        }
        for lora in plan.request.loras
    ]
    return {"loras": json.dumps(loras), "components": ",".join(component.name for component in plan.components)}


def _put_tokenizer(plan: ExportTask, name: str, folder: Path) -> None:
    from hypergen_export.conversion.tokenizer import write_tokenizer

    if plan.holds_tokenizer(name):
        link_or_copy(plan.earlier.folder / tokenizer_file(name), folder / tokenizer_file(name))
        return
    with _needs_the_extra():
        write_tokenizer(plan.checkpoint, name, folder / tokenizer_file(name))


def _convert(plan: ExportTask, folder: Path) -> dict[str, Any]:
    with _needs_the_extra():
        from hypergen_export.conversion.convert import Job, convert
        from hypergen_export.conversion.progress import Progress

    jobs = [
        Job(component=c, dtype=plan.weights_dtype(c), onnx=version_folder(folder, c) / _ONNX) for c in plan.outdated
    ]
    finish = functools.partial(_build, plan.shapes, plan.target) if plan.target else None
    progress = Progress((_STAGES_PER_COMPONENT + bool(finish)) * len(jobs))
    with contextlib.closing(progress):
        parity = convert(plan.checkpoint, jobs, progress, finish)
    return {name: asdict(entry) for name, entry in parity.items()}


def _build(shapes: Shapes, target: Target, job: Job, report: Callable[[float], None]) -> None:
    """Replace a component's ONNX by its plan and the plan's record."""
    build = Build(
        name=job.component.name,
        onnx=job.onnx,
        dtype=job.dtype,
        plan=job.onnx.with_name(TENSORRT.file),
        profiles=profiles(job.component, shapes),
        target=target,
    )
    write_plan_record(build, build_plan(build, report))
    for file in job.onnx.parent.glob(f"{_ONNX}*"):
        file.unlink()


@contextlib.contextmanager
def _needs_the_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; an export needs: pip install 'hypergen-triton[export]'"
        ) from error


def _record(plan: ExportTask, folder: Path, parity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": plan.key,
        "model": plan.request.model,
        **plan.request.settings,
        "target": asdict(plan.target) if plan.target else None,
        "versions": _versions(),
        "components": {
            component.name: {
                "key": plan.keys[component.name],
                "parity": parity.get(component.name) or plan.recorded(component)["parity"],
            }
            for component in plan.components
        },
        "tokenizers": plan.tokenizer_keys,
        "loras": [{"name": lora.name, "scale": lora.scale, "sha256": lora.sha256} for lora in plan.request.loras],
        "hashes": plan.hashes.remembered,
        "files": file_sizes(folder),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _take_over(source: Path, target: Path) -> None:
    for file in source.iterdir():
        link_or_copy(file, target / file.name)
