"""Quantized weights of single files: GGUF and scaled fp8, dequantized to bfloat16.

They are written to a temporary file, tensor by tensor and in slices, and converted from there like any others: so a
model of many gigabytes takes no memory, but for a while its size on the disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hypergen_export.conversion.sources import Source, write_sources
from hypergen_export.errors import BrokenCheckpointError, MissingDependencyError, UnsupportedModelError, first_line
from hypergen_export.single_files.kinds import Shapes
from hypergen_export.single_files.reading import (
    SingleFile,
    Tensors,
    map_safetensors,
    read_single_file,
    written_dtype,
)

Report = Callable[[float], None]
_TEMPORARY = ".dequantized.safetensors"
# Elements that are dequantized at a time.
_SLICE = 2**24
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The scale beside a layer's fp8 weights, by ComfyUI's former and present names.
_SCALES = (".scale_weight", ".weight_scale")
# ComfyUI's further tensors: markers, and scales of activations, which stay in bfloat16 here.
_BESIDE = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")
# A tensor's name -> what its file was quantized by.
_UNREAD = {
    r".*\.(qweight|wscales|wzeros|wtscale|smooth_factor(_orig)?)": "by nunchaku (SVDQuant)",
    r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)": "by bitsandbytes",
    r".*\.weight_scale_2": "to nvfp4",
}


@contextlib.contextmanager
def dequantized(
    path: Path, folder: Path, report: Report, check: Callable[[Shapes], object] = lambda _: None
) -> Iterator[tuple[SingleFile, Report]]:
    """The file with plain weights while the context lasts, and what hears of the rest of the work.

    `folder` gets a temporary file if there is anything to dequantize; `check` may refuse the tensors' shapes before.
    Raises ExportError, OSError.
    """
    plain, sources = _read(path)
    check(plain.shapes | {source.name: source.shape for source in sources})
    if not sources:
        yield plain, report
        return
    temporary = folder / _TEMPORARY
    total, done = sum(math.prod(source.shape) for source in sources), 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        report(done / (total * torch.bfloat16.itemsize) / 2)

    try:
        write_sources(temporary, sources, torch.bfloat16, count)
        tensors = {**plain.tensors, **map_safetensors(temporary)}
        yield replace(plain, tensors=tensors), lambda fraction: report((1 + fraction) / 2)
    finally:
        temporary.unlink(missing_ok=True)


def bytes_to_write(path: Path) -> int:
    """What a conversion takes on the disk: plain tensors once, dequantized ones twice. Raises ExportError."""
    plain, sources = _read(path)
    kept = sum(each.numel() * written_dtype(each.dtype).itemsize for each in plain.tensors.values())
    return kept + 2 * torch.bfloat16.itemsize * sum(math.prod(source.shape) for source in sources)


def _read(path: Path) -> tuple[SingleFile, list[Source]]:
    """The tensors that need no change, and the others."""
    if path.suffix == ".gguf":
        return _read_gguf(path)
    file = read_single_file(path)
    _check(file.tensors)
    return _read_fp8(file)


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    for name in tensors:
        for pattern, how in _UNREAD.items():
            if re.fullmatch(pattern, name):
                raise UnsupportedModelError(
                    f"its weights are quantized {how} ({name}), which is not supported; take the model's bfloat16, fp8 "
                    "or GGUF file"
                )


def _read_fp8(file: SingleFile) -> tuple[SingleFile, list[Source]]:
    """Layers with a scale beside their fp8 weights, as ComfyUI stores them: the values are weights times scale."""
    scales = {
        f"{name.removesuffix(ending)}.weight": name
        for ending in _SCALES
        for name in file.tensors
        if name.endswith(ending)
    }
    scaled = {weight: scale for weight, scale in scales.items() if _is_fp8(file.tensors.get(weight))}
    for name in (name for name in file.tensors if name.endswith(".comfy_quant")):
        _check_format(name, file.tensors[name])
    sources = [_scaled(name, file.tensors[name], file.tensors[scale]) for name, scale in scaled.items()]
    taken = {*scaled, *scaled.values()}
    # A scale beside weights that are not fp8 is not ComfyUI's: `check_precisions` rejects it.
    taken |= {name for name in file.tensors if scaled and _BESIDE.fullmatch(name)}
    left = {name: tensor for name, tensor in file.tensors.items() if name not in taken}
    return replace(file, tensors=left), sources


def _is_fp8(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in _FP8


def _check_format(name: str, tensor: torch.Tensor) -> None:
    """Raise UnsupportedModelError for a layer that ComfyUI quantized to something else than fp8."""
    try:
        stated = json.loads(bytes(tensor.numpy()))["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{name} cannot be read ({first_line(error)})") from error
    if not str(stated).startswith("float8_"):
        raise UnsupportedModelError(f"its weights are quantized to {str(stated)[:40]} ({name}), which is not supported")


def _scaled(name: str, weight: torch.Tensor, scale: torch.Tensor) -> Source:
    is_of_rows = scale.numel() == 1 or scale.shape[:1] == weight.shape[:1] == (scale.numel(),)
    if not (weight.ndim and weight.numel() and is_of_rows and scale.is_floating_point()):
        raise UnsupportedModelError(f"the scale of {name} is of another kind than one for all or for each row")
    factors = scale.float().reshape(-1, *[1] * (weight.ndim - 1))

    def dequantize(first: int, end: int) -> torch.Tensor:
        return weight[first:end].float() * (factors if len(factors) == 1 else factors[first:end])

    return _by_slices(name, tuple(weight.shape), dequantize)


def _by_slices(name: str, shape: tuple[int, ...], dequantize: Callable[[int, int], torch.Tensor]) -> Source:
    """A tensor whose rows from first to end `dequantize` returns in float32."""
    step = max(1, _SLICE // max(1, math.prod(shape[1:])))

    def read() -> torch.Tensor:
        starts = range(0, shape[0], step)
        return torch.cat([dequantize(first, min(first + step, shape[0])).to(torch.bfloat16) for first in starts])

    return Source(name=name, shape=shape, read=read)


def _read_gguf(path: Path) -> tuple[SingleFile, list[Source]]:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("GGUF files need the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path, "c")
    except Exception as error:  # the package raises ValueError, IndexError, and numpy's errors
        raise BrokenCheckpointError(f"the GGUF file cannot be read ({first_line(error)})") from error
    plain: Tensors = {}
    sources = []
    for tensor in reader.tensors:
        shape = _shape(reader, tensor)
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            plain[tensor.name] = torch.from_numpy(tensor.data).reshape(shape)
        else:
            sources.append(_quantized(tensor, shape))
    return SingleFile(path=path, tensors=plain, metadata={}), sources


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """The tensor's shape; that of tensors of more than four axes is stated beside them by ComfyUI-GGUF."""
    stated = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    sides = tensor.shape[::-1] if stated is None else [stated.parts[part][0] for part in stated.data]
    shape = tuple(int(side) for side in sides)
    if math.prod(shape) != tensor.n_elements or not all(side > 0 for side in shape):
        raise BrokenCheckpointError(f"{tensor.name} has {tensor.n_elements} values, but its shape is {shape}")
    return shape


def _quantized(tensor: Any, shape: tuple[int, ...]) -> Source:
    import gguf

    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    kind = tensor.tensor_type
    try:
        gguf.quants.dequantize(rows[:1], kind)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{tensor.name} is {kind.name}, which the package gguf does not dequantize"
        ) from error
    flat = (len(rows), tensor.n_elements // len(rows))

    def dequantize(first: int, end: int) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(rows[first:end], kind))

    source = _by_slices(tensor.name, flat, dequantize)
    return replace(source, shape=shape, read=lambda: source.read().reshape(shape))
