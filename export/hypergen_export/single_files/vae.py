"""A VAE in one file: an AutoencoderKL by the names of latent diffusion or diffusers, or an AutoencoderTiny."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypergen_export.errors import BrokenCheckpointError, NotADiffusersPipelineError
from hypergen_export.single_files.configs import Config, vae_config
from hypergen_export.single_files.folder import check_precisions, named, write_modules
from hypergen_export.single_files.modules import VAE, Module, checked, converted_vae
from hypergen_export.single_files.quantized import dequantized
from hypergen_export.single_files.reading import Tensors


def convert_vae(path: Path, folder: Path, own: Mapping[str, Any], report: Callable[[float], None]) -> None:
    """Write the VAE's config and weights to `folder`. `own`: entries of its config that weights do not say.

    Raises ExportError, OSError.
    """
    with named(path), dequantized(path, folder, report) as (file, rest):
        tensors = dict(file.tensors)
        check_precisions(tensors)
        write_modules({folder: _module(tensors, own)}, rest)


def _module(tensors: Tensors, own: Mapping[str, Any]) -> Module:
    # A whole checkpoint has one, too.
    if any(name.startswith(VAE) for name in tensors):
        tensors = {name.removeprefix(VAE): each for name, each in tensors.items() if name.startswith(VAE)}
    if any(name.startswith("encoder.down.") for name in tensors):
        return checked(converted_vae(tensors, own))
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return checked(Module(name="vae", loader="diffusers.AutoencoderKL", config=_kl(tensors, own), tensors=tensors))
    if "decoder.layers.0.weight" in tensors:
        return checked(Module(name="vae", loader="diffusers.AutoencoderTiny", config=_tiny(tensors), tensors=tensors))
    raise NotADiffusersPipelineError("it holds no VAE by the names of latent diffusion or diffusers")


def _kl(tensors: Tensors, own: Mapping[str, Any]) -> Config:
    """The config of a VAE by diffusers' names, whose blocks are numbered alike on the way down."""
    names = {
        re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2.", name): tuple(each.shape)
        for name, each in tensors.items()
    }
    try:
        return vae_config(own, names)
    except KeyError as error:
        raise BrokenCheckpointError(f"its VAE lacks tensors: {error.args[0]}") from error


def _tiny(tensors: Tensors) -> Config:
    """The config of an AutoencoderTiny: those that are published differ in latent channels alone."""
    return {"_class_name": "AutoencoderTiny", "latent_channels": tensors["decoder.layers.0.weight"].shape[1]} | {
        "block_out_channels": [64, 64, 64, 64],
        "scaling_factor": 1.0,
    }
