"""What `hypergen estimate` answers, and what an export says before it builds engines: which GPU memory they need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import CALIBRATED, LoraPool
from hypergen_export.checkpoints.defaults import checkpoint_parameters
from hypergen_export.engines.engine import TENSORRT, Size, check_dtype, check_family, check_lora_rank, choose_sizes
from hypergen_export.engines.memory import FIXED_BYTES, Model, parameters
from hypergen_export.engines.profiles import Shapes, shapes_of
from hypergen_export.errors import BadOptionError

# Graphics cards are sold in GB and have GiB.
_UNITS = {"": 2**30, "G": 2**30, "GB": 2**30, "GIB": 2**30, "M": 2**20, "MB": 2**20, "MIB": 2**20}
_SIDE_STEP = 256
# Triton's TensorRT backend reads a plan into a string and copies that. The builder's peak is that of TensorRT-RTX.
_COPIES_LOADED, _COPIES_BUILT = 2, 3
# Of each parameter: the pipeline that calibrates computes in float32.
_CALIBRATED_BYTES = 4


@dataclass(frozen=True)
class Answer:
    """The lines to print, and whether the model fits into the GPU that was asked for."""

    lines: Sequence[str]
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Question:
    """A checkpoint and the options of its export; `gpu` are the bytes of a GPU that it should fit into, if any."""

    checkpoint: Checkpoint
    dtype: str
    sizes: Sequence[Size] = ()
    max_batch_size: int
    lora_rank: int = 0
    gpu: int | None = None


def answer(question: Question) -> Answer:
    """Estimate the engines of a checkpoint. Raises ExportError."""
    check_dtype(TENSORRT, question.dtype)
    checkpoint = question.checkpoint
    check_family(TENSORRT, question.dtype, checkpoint.family)
    check_lora_rank(question.dtype, question.lora_rank)
    limits = checkpoint_parameters(checkpoint)
    sizes = choose_sizes(TENSORRT, question.sizes, limits)
    shapes = shapes_of(checkpoint, sizes, checkpoint.family.guided_rows * question.max_batch_size)
    components = checkpoint.family.components
    if question.lora_rank:
        pool = LoraPool.of_columns(question.lora_rank, kernels=True)
        components = tuple(component.with_pool(pool) for component in components)
    engines = Model(checkpoint=checkpoint, components=components, dtype=question.dtype)
    lines = list(table(engines, shapes))
    if question.gpu is None:
        return Answer(lines, fits=True)
    fits = engines.total(shapes) <= question.gpu
    return Answer([*lines, verdict(engines, shapes, question.gpu, int(limits["max_size"]))], fits)


def table(engines: Model, shapes: Shapes) -> Iterator[str]:
    """What each component needs, and all together."""
    rows = [
        (need.name, need.dtype, _gib(need.weights), _gib(need.activations), _gib(need.weights + need.activations))
        for need in engines.needs(shapes)
    ]
    sizes = ", ".join(f"{width}x{height}" for width, height in shapes.image_sizes)
    images = shapes.rows // engines.checkpoint.family.guided_rows
    yield f"GPU memory for images of {sizes}, at most {images} in a denoiser call, in GiB:"
    head = ("component", "precision", "weights", "activations", "together")
    rest = [
        ("CUDA and Triton (assumed)", "", "", "", _gib(FIXED_BYTES)),
        ("total", "", "", "", _gib(engines.total(shapes))),
    ]
    for name, dtype, *figures in (head, *rows, *rest):
        yield f"  {name:26}{dtype:10}" + "".join(f"{figure:>12}" for figure in figures)
    largest = max(need.weights for need in engines.needs(shapes))
    done = "calibrated and built" if engines.dtype in CALIBRATED else "built"
    yield (
        f"Host memory: {_gib(_COPIES_LOADED * largest)} GiB while Triton loads the largest engine, about "
        f"{_gib(host_bytes(engines, shapes))} GiB while it is {done}."
    )
    yield "Weights are exact; activations are an estimate. Nothing was built, and latency is not estimated."


def host_bytes(engines: Model, shapes: Shapes) -> int:
    """The host's memory that an export needs, for its largest engine or to calibrate. Raises BrokenCheckpointError."""
    built = _COPIES_BUILT * max(need.weights for need in engines.needs(shapes))
    if engines.dtype not in CALIBRATED:
        return built
    family = engines.checkpoint.family
    loaded = (family.denoiser, *family.text_encoders)
    return max(built, _CALIBRATED_BYTES * sum(parameters(engines.checkpoint, component) for component in loaded))


def verdict(engines: Model, shapes: Shapes, gpu: int, max_side: int) -> str:
    """Whether that fits into `gpu` bytes, and what would at most."""
    batch = engines.largest_batch(shapes, gpu)
    if engines.total(shapes) <= gpu:
        return f"It fits into {_gib(gpu)} GiB; the largest --max-batch-size that fits is {batch}."
    if batch:
        return f"It does not fit into {_gib(gpu)} GiB, but --max-batch-size {batch} does."
    side = _largest_side(engines, shapes, gpu, max_side)
    if side:
        return f"It does not fit into {_gib(gpu)} GiB, but --sizes {side}x{side} --max-batch-size 1 does."
    weights = sum(need.weights for need in engines.needs(shapes))
    return f"It does not fit into {_gib(gpu)} GiB in any size: the weights alone need {_gib(weights)} GiB."


def _largest_side(engines: Model, shapes: Shapes, gpu: int, max_side: int) -> int:
    """The side of the largest square image that fits alone, 0 if none does."""
    sides = range(_SIDE_STEP, max_side + 1, _SIDE_STEP)
    rows = engines.checkpoint.family.guided_rows
    squares = ((side, replace(shapes, image_sizes=((side, side),), rows=rows)) for side in sides)
    return max((side for side, square in squares if engines.total(square) <= gpu), default=0)


def read_memory(text: str) -> int:
    """Bytes of a GPU's memory as in 24GB. Raises BadOptionError."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise BadOptionError(f"--gpu: must be an amount such as 24GB, not {text[:40]!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
