"""A transformer in one file, as FLUX.1, FLUX.2, SD 3 and Z-Image are distributed, by diffusers' own conversion.

The rest of the pipeline, with the config and the schedule that the file does not have, is a pipeline's folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypergen_export.errors import BrokenCheckpointError, NotADiffusersPipelineError, UnsupportedModelError
from hypergen_export.single_files.folder import check_precisions, named, write_modules
from hypergen_export.single_files.kinds import UNET
from hypergen_export.single_files.modules import Module, NoCopies, checked
from hypergen_export.single_files.quantized import dequantized
from hypergen_export.single_files.reading import Tensors

# Tensors of all-in-one files that are taken from the pipeline's folder instead.
_OTHER_PARTS = ("text_encoders.", "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.")


def convert_transformer(
    path: Path, folder: Path, base: Mapping[str, Any], report: Callable[[float], None]
) -> list[str]:
    """Write the transformer's config and weights to `folder`; returns notices, one line each.

    `base` is the config of the pipeline's own transformer. Raises ExportError, OSError.
    """
    with named(path), dequantized(path, folder, report) as (file, rest):
        module, notices = _module(dict(file.tensors), base)
        write_modules({folder: module}, rest)
    return notices


def _module(tensors: Tensors, base: Mapping[str, Any]) -> tuple[Module, list[str]]:
    check_precisions(tensors)
    own = {name: each for name, each in tensors.items() if not name.startswith(_OTHER_PARTS)}
    notices = []
    if len(own) < len(tensors):
        notices.append("has text encoders or a VAE too, which are not served: those of --text-encoder and --vae are")
    with NoCopies() as used:
        converted = _by_diffusers_names({name.removeprefix(UNET): each for name, each in own.items()}, base)
    config = dict(base)
    if "guidance_embeds" in base:
        config["guidance_embeds"] = any("guidance_embedder" in name for name in converted)
    module = checked(
        Module(name="transformer", loader=f"diffusers.{base['_class_name']}", config=config, tensors=converted)
    )
    used.add_all(module.tensors.values())
    left = sorted(name for name, tensor in own.items() if not used.has(tensor))
    if left:
        notices.append(f"left out {len(left)} tensors that have no place in the model, for example {left[0]}")
    return module, notices


def _by_diffusers_names(tensors: Tensors, base: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if any(name.startswith(("transformer_blocks.", "all_x_embedder.")) for name in tensors):
        return tensors
    known: Any = SINGLE_FILE_LOADABLE_CLASSES.get(str(base.get("_class_name")))
    if known is None:
        raise UnsupportedModelError(f"diffusers reads no single files of a {base.get('_class_name')}")
    convert = known["checkpoint_mapping_fn"]
    takes_config = "config" in inspect.signature(convert).parameters
    try:
        converted: Tensors = convert(checkpoint=tensors, **({"config": dict(base)} if takes_config else {}))
    except KeyError as error:
        raise BrokenCheckpointError(f"its transformer lacks tensors: {error.args[0]}") from error
    except (IndexError, ValueError, RuntimeError) as error:
        raise NotADiffusersPipelineError(f"it is not a {base['_class_name']}, as the pipeline's own is") from error
    return converted
