"""The measurement: images of an export and of its checkpoint in float32, at equal seeds, compared one by one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository, is_repository, repository_path
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.backend import GenerationRequest, ModelDescription, Pixels, Quality
from hypergen_gateway.passport.errors import PassportError
from hypergen_gateway.passport.prompts import choose_prompts
from hypergen_gateway.passport.record import (
    ImageQuality,
    Passport,
    Repository,
    SettingQuality,
    open_repository,
    read_passport,
    shortest_time,
    write_passport,
)
from hypergen_gateway.passport.samples import Sample, SampleStore, sample_all
from hypergen_gateway.passport.table import name_of
from hypergen_gateway.serving import GENERATE_SECONDS, TritonOptions, complete, connected

logger = logging.getLogger(__name__)

Fields = Mapping[str, int | float | str]
# The fields that a setting may have: those that leave out work, or do it otherwise.
FIELDS: Mapping[str, type[int] | type[float] | type[str]] = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "guidance_start": float,
    "guidance_end": float,
    "cache_interval": int,
    "scheduler": str,
}
# What exports are compared with, as `_Side.name` says it.
FLOAT32 = "openvino float32"
# Measured unasked if the export has a shallow UNet.
_CACHE_INTERVALS = (2, 3)


@dataclass(frozen=True, kw_only=True)
class PassportOptions:
    """What to measure, and against what.

    `reference` is a float32 repository or a checkpoint, `reference_url` a Triton that serves in float32; without either
    the reference is exported from what the export was made of, with the options of `export`.
    """

    triton: TritonOptions
    export: ExportOptions
    prompts: tuple[str, ...] = ()
    count: int | None = None
    settings: tuple[Fields, ...] = ()
    reference: str | None = None
    reference_url: str | None = None

    @property
    def is_specific(self) -> bool:
        """Whether it says more than which export is meant."""
        return bool(self.prompts or self.count or self.settings or self.reference or self.reference_url)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A passport, and the images that it is about: those in float32, and those of each setting by its name."""

    passport: Passport
    reference: Sequence[Pixels]
    images: Mapping[str, Sequence[Pixels]]


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One of the two models that are compared: how to reach it, what it is, and its repository if that is here."""

    triton: TritonOptions
    description: ModelDescription
    repository: Repository | None

    @property
    def key(self) -> str:
        """The key of its export; empty if that is unknown."""
        return self.repository.key if self.repository else ""

    @property
    def name(self) -> str:
        record = {} if self.repository is None else self.repository.record
        return f"{record['engine']} {record['dtype']}" if record else f"Triton at {self.triton.url}"


def find_passport(options: TritonOptions) -> Passport:
    """The passport of a repository, or of the cached export of a checkpoint. Raises PassportError."""
    folder = _existing_repository(options)
    if folder is None:
        raise PassportError(
            f"{options.model} has not been exported with these options; --measure exports and measures it"
        )
    passport = read_passport(open_repository(folder))
    if passport is None:
        raise PassportError(f"{options.model} has no passport; --measure measures it")
    return passport


def _existing_repository(options: TritonOptions) -> Path | None:
    if is_repository(options.model):
        return Path(options.model)
    if options.export is None:
        return None
    folder = repository_path(options.model, options.export)
    return folder if is_repository(str(folder)) else None


async def describe(options: TritonOptions) -> ModelDescription:
    """The description of the model that a running Triton serves. Raises UnavailableError."""
    async with connected(options, GENERATE_SECONDS) as backend:
        try:
            return await backend.describe()
        except UnavailableError as error:
            raise UnavailableError(f"No model is available at {options.url} ({error.detail}).") from error


async def measure(precisions: Sequence[PassportOptions]) -> list[Measured]:
    """Measure exports; their passports are written into their repositories, if those are on this machine.

    All are exported before the first is measured, which takes long: one may be refused.

    Raises:
        PassportError, EmbeddedError, ExportFailedError, HyperGenError
    """
    if find_spec("skimage") is None:
        raise PassportError("scikit-image is not installed; a passport needs: pip install 'hypergen-triton[passport]'")
    sides = []
    for options in precisions:
        served = await _served(options)
        sides.append((options, served, await _reference(options, served)))
    return [await _measure(*each) for each in sides]


async def _measure(options: PassportOptions, served: _Side, reference: _Side) -> Measured:
    settings = _settings(options, served.description)
    plain = _requests(options, served.description)
    # By turns, so that what else the machine does falls on all settings.
    requests = [_with(request, fields) for request in plain for fields in settings]
    folder = options.export.cache_dir / "passports"
    kept = SampleStore(folder, served.key)
    # Before the reference, which takes long: a request may be refused.
    ours = await sample_all(_connect(served), requests, kept, served.name)
    theirs = await sample_all(
        _connect(reference), plain, SampleStore(folder, reference.key), f"reference, {reference.name}"
    )
    by_setting = [ours[number :: len(settings)] for number in range(len(settings))]
    compared = tuple(
        SettingQuality(fields=fields, images=tuple(map(_compare, plain, samples, theirs)))
        for fields, samples in zip(settings, by_setting, strict=True)
    )
    passport = _passport(served, reference, plain[0], compared, shortest_time(theirs))
    if served.repository is not None:
        _write(served.repository, passport)
    if served.key != reference.key:
        kept.clear()  # the next measurement is to be one
    images = (_pixels(samples) for samples in by_setting)
    return Measured(
        passport=passport,
        reference=_pixels(theirs),
        images=dict(zip(map(name_of, settings), images, strict=True)),
    )


def _pixels(samples: Sequence[Sample]) -> list[Pixels]:
    return [sample.pixels for sample in samples]


def _write(repository: Repository, passport: Passport) -> None:
    """Write the passport; on a read-only volume it can at least be shown."""
    try:
        write_passport(repository, passport)
    except PassportError as error:
        logger.warning("%s", error)


def _passport(
    served: _Side,
    reference: _Side,
    request: GenerationRequest,
    settings: tuple[SettingQuality, ...],
    reference_seconds: float,
) -> Passport:
    record = served.repository.record if served.repository else {}
    return Passport(
        key=served.key,
        model=served.description.model_id,
        engine=record.get("engine", ""),
        dtype=record.get("dtype", ""),
        reference=reference.name,
        reference_seconds=reference_seconds,
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        request=_described(request),
        settings=settings,
    )


def check_psnr(rows: Sequence[Quality], passport: Passport | None, least: float) -> None:
    """Raise PassportError if images as served by default are on average farther from float32 than `least` dB."""
    row = next((row for row in rows if not row.fields), None)
    if row is None:
        raise PassportError("--min-psnr: the passport does not have images as served by default; measure it again")
    if row.psnr >= least:
        return
    worst = ""
    if passport is not None:
        images = next(setting.images for setting in passport.settings if not setting.fields)
        worst = f" for {min(images, key=lambda image: image.psnr).prompt!r}"
    raise PassportError(
        f"PSNR is {row.psnr:.1f} dB on average over {row.prompts} prompts, below --min-psnr {least:g} "
        f"(lowest {row.lowest_psnr:.1f} dB{worst}; SSIM {row.ssim:.4f})"
    )


async def _served(options: PassportOptions) -> _Side:
    triton = options.triton
    if triton.url is None:
        assert triton.export is not None
        return _of_repository(await find_repository(triton.model, triton.export), options.export)
    repository = open_repository(Path(triton.model)) if is_repository(triton.model) else None
    description = await describe(triton)
    if repository is not None and repository.key != description.export_key:
        served, given = map(_stated, (description, repository.description))
        raise PassportError(
            f"Triton at {triton.url} serves {served}, but {repository.folder} is "
            f"{'another export of it' if given == served else given}"
        )
    return _Side(triton=triton, description=description, repository=repository)


def _stated(model: ModelDescription) -> str:
    return f"{model.model_id} ({model.engine} {model.dtype})"


async def _reference(options: PassportOptions, served: _Side) -> _Side:
    if options.reference_url is not None:
        triton = TritonOptions(model="", url=options.reference_url, export=None)
        return _Side(triton=triton, description=await describe(triton), repository=None)
    if options.reference is not None:
        side = _of_repository(await find_repository(options.reference, options.export), options.export)
    elif served.repository is None:
        raise PassportError("--triton-url: pass the folder of its repository as MODEL, or --reference")
    elif served.name == FLOAT32:
        side = _of_repository(served.repository.folder, options.export)
    else:
        source = {name: _frozen(value) for name, value in served.repository.record["source"].items()}
        model = source.pop("model")
        side = _of_repository(await find_repository(model, replace(options.export, **source)), options.export)
    if side.name != FLOAT32:
        raise PassportError(f"--reference: {options.reference} is an export to {side.name}, not to {FLOAT32}")
    return side


def _of_repository(folder: Path, export: ExportOptions) -> _Side:
    repository = open_repository(folder)
    bare = ExportOptions(dtype=export.dtype, max_batch_size=export.max_batch_size, cache_dir=export.cache_dir)
    triton = TritonOptions(model=str(folder), url=None, export=bare)
    return _Side(triton=triton, description=repository.description, repository=repository)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _settings(options: PassportOptions, model: ModelDescription) -> tuple[Fields, ...]:
    """The settings that are measured: as served, with deep features reused if they can be, and those asked for."""
    intervals: list[Fields] = [
        {"cache_interval": each} for each in _CACHE_INTERVALS if each <= model.max_cache_interval
    ]
    unique = {name_of(fields): fields for fields in ({}, *intervals, *options.settings)}
    return tuple(unique.values())


def _requests(options: PassportOptions, model: ModelDescription) -> list[GenerationRequest]:
    prompts = choose_prompts(options.prompts, model.suggestions, options.count)
    return [
        complete({"prompt": prompt, "seed": seed, "return_latents": True}, model, with_lora=False)
        for seed, prompt in enumerate(prompts)
    ]


def _with(request: GenerationRequest, fields: Mapping[str, Any]) -> GenerationRequest:
    return replace(request, **fields)


def _described(request: GenerationRequest) -> Fields:
    names = ("width", "height", "num_inference_steps", "guidance_scale")
    return {name: getattr(request, name) for name in names}


def _compare(request: GenerationRequest, ours: Sample, theirs: Sample) -> ImageQuality:
    from hypergen_gateway.passport.similarity import psnr, relative_error, ssim

    if ours.pixels.shape != theirs.pixels.shape:
        raise PassportError(f"the reference generates {theirs.pixels.shape[:2]} pixels, not {ours.pixels.shape[:2]}")
    return ImageQuality(
        prompt=request.prompt,
        seed=request.seed,
        psnr=psnr(ours.pixels, theirs.pixels),
        ssim=ssim(ours.pixels, theirs.pixels),
        latents_error=None
        if ours.latents is None or theirs.latents is None
        else relative_error(ours.latents, theirs.latents),
        seconds=ours.seconds,
    )


def _connect(side: _Side) -> Any:
    return functools.partial(connected, side.triton, GENERATE_SECONDS)
