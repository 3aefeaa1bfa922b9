"""Write a single file as a folder in diffusers' layout: the same values, by diffusers' names."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypergen_export.checkpoints.defaults import few_steps_word
from hypergen_export.conversion.sources import write_tensors
from hypergen_export.errors import ExportError, UnsupportedModelError
from hypergen_export.single_files.clip_vocabulary import write_clip_tokenizer
from hypergen_export.single_files.kinds import SD_2, VELOCITY, ClipEncoder, Kind, Shapes, complete_names, kind_of
from hypergen_export.single_files.modules import Module, modules_of
from hypergen_export.single_files.prediction import Prediction, prediction_of
from hypergen_export.single_files.quantized import dequantized
from hypergen_export.single_files.reading import SingleFile, Tensors, written_dtype

Report = Callable[[float], None]
_EMA = "model_ema."
# Of the images on which Stable Diffusion 2.x learnt to predict velocity, in pixels.
_SIDE_OF_VELOCITY = 768
# Tensors beside the modules: the schedule's tables, the trainer's state, and what no pipeline computes with.
_NOT_OF_A_MODULE = re.compile(
    r"(alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|model_ema\.|denoiser\.|global_step|"
    r"scale_factor|v_pred$|ztsnr$|.*\.position_ids$|.*logit_scale$|.*\.attn_mask$|.*text_projection(\.weight)?$|"
    r"cond_stage_model\.model\.transformer\.resblocks\.23\.|first_stage_model\.loss\.|__).*"
)
_WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a file was converted to: its base model, and notices about it, one line each.

    `missing` are the modules that it lacks, `vae` the entries of a VAE's config that its kind has. `text_encoders` are
    those of its kind, and `context_width` how many features of all of them its UNet reads.
    """

    base: str
    notices: tuple[str, ...]
    missing: tuple[str, ...]
    vae: Mapping[str, Any]
    text_encoders: tuple[ClipEncoder, ...]
    context_width: int


def convert_single_file(path: Path, folder: Path, prediction_type: str | None, report: Report) -> Converted:
    """Write the file's modules, configs and tokenizers to `folder`. Raises ExportError, OSError."""
    with named(path), dequantized(path, folder, report, _kind) as (file, rest):
        return _convert(file, folder, prediction_type, rest)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the file's name before the block's errors."""
    try:
        yield
    except ExportError as error:
        text = str(error)
        raise type(error)(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _convert(file: SingleFile, folder: Path, prediction_type: str | None, report: Report) -> Converted:
    tensors = complete_names(file.tensors)
    kind = _kind(file.shapes)
    check_precisions(tensors)
    prediction = prediction_of(file, _has_velocity(kind, file), prediction_type)
    if kind.title == SD_2.title and prediction.type == VELOCITY:
        kind = replace(kind, side=_SIDE_OF_VELOCITY)
    modules, left = modules_of(kind, tensors)
    scheduler = _scheduler(kind, prediction, file.path.stem)
    write_modules({folder / module.name: module for module in modules}, report)
    for encoder in kind.text_encoders:
        write_clip_tokenizer(folder / encoder.tokenizer, encoder.pad_token)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", _index(kind, modules, scheduler, file.path.stem))
    found = {module.name for module in modules}
    return Converted(
        base=kind.title,
        notices=tuple(_notices(kind, left, prediction)),
        missing=tuple(sorted({"vae", *(each.module for each in kind.text_encoders)} - found)),
        vae={"scaling_factor": kind.scaling_factor, "force_upcast": kind.force_upcast},
        text_encoders=kind.text_encoders,
        context_width=next(module.config["cross_attention_dim"] for module in modules if module.name == "unet"),
    )


def _kind(shapes: Shapes) -> Kind:
    return kind_of(complete_names(shapes))


def check_precisions(tensors: Tensors) -> None:
    """Reject weights that are quantized in a way that `dequantized` does not read."""
    for name, tensor in tensors.items():
        if name.endswith((".scale_weight", ".weight_scale")):
            raise UnsupportedModelError(f"its weights have scales of an unknown kind ({name}), which is not supported")
        if name.endswith("weight") and not tensor.is_floating_point():
            raise UnsupportedModelError(f"its weights are quantized ({name} is {tensor.dtype}), which is not supported")


def write_modules(modules: Mapping[Path, Module], report: Report) -> None:
    """Write each module to its folder."""
    total = sum(tensor.nbytes for module in modules.values() for tensor in module.tensors.values())
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        report(done / total)

    for folder, module in modules.items():
        _write_module(module, folder, count)


def _write_module(module: Module, folder: Path, report: Callable[[int], None]) -> None:
    """Write a module's config and weights; `report` hears the bytes of each tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", module.config)
    typed = {name: (tensor, written_dtype(tensor.dtype)) for name, tensor in module.tensors.items()}
    write_tensors(folder / _WEIGHTS[module.loader.partition(".")[0]], typed, report)


def _has_velocity(kind: Kind, file: SingleFile) -> bool:
    """Stable Diffusion 2.x predicts velocity, but for its models of 512 pixels, such as SD-Turbo and inpainting."""
    return kind.title == SD_2.title and not few_steps_word(file.path.stem)


def _scheduler(kind: Kind, prediction: Prediction, name: str) -> dict[str, Any]:
    scheduler = {**kind.scheduler, "prediction_type": prediction.type}
    if few_steps_word(name) and kind.scheduler["_class_name"] == "EulerDiscreteScheduler":
        scheduler["timestep_spacing"] = "trailing"
    if prediction.is_zero_snr:
        # The first step then is at the schedule's end, the pure noise that the model was trained on.
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler


def _index(kind: Kind, modules: list[Module], scheduler: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "_class_name": kind.pipeline,
        "_name_or_path": name,
        "_base_model": kind.title,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{module.name: module.loader.split(".") for module in modules},
        **{each.tokenizer: ["transformers", "CLIPTokenizer"] for each in kind.text_encoders},
        **kind.index,
    }


def _notices(kind: Kind, left: set[str], prediction: Prediction) -> Iterator[str]:
    if prediction.said_by:
        yield f"predicts {prediction.type}, as {prediction.said_by} says"
    elif kind.title == SD_2.title:
        yield f"taken for a model that predicts {prediction.type}, which the file does not say: see --prediction-type"
    if any(name.startswith(_EMA) for name in left):
        yield "has averaged weights (model_ema) too, which are not served: diffusers does not load them either"
    unknown = sorted(name for name in left if not _NOT_OF_A_MODULE.fullmatch(name))
    if unknown:
        yield f"left out {len(unknown)} tensors that have no place in the model, for example {unknown[0]}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
