"""The engines as data, and the checks of the options that depend on them. Has no heavy imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypergen_export.checkpoints.components import CALIBRATED, INT8, QUANTIZED, WEIGHTS_ONLY, Component
from hypergen_export.checkpoints.family import Family
from hypergen_export.errors import BadOptionError

# Width and height in pixels.
Size = tuple[int, int]

# Each size is a profile, which adds build time and GPU memory.
MAX_SIZES = 16
# Sides of reference images where engines are built for sizes, in pixels: up to the longest that FLUX.1-Kontext prefers.
# The VAE encoder reserves memory for a square of the longest.
REFERENCE_SIDES = (64, 1568)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`name` is Triton's backend, `file` the file it loads, `quantized_file` that of a quantised component.

    `any_size`: image sizes need not be known at export.
    """

    name: str
    file: str
    quantized_file: str
    device: str
    dtypes: tuple[str, ...]
    any_size: bool


OPENVINO = Engine(
    name="openvino",
    file="model.onnx",
    quantized_file="model.xml",
    device="cpu",
    dtypes=("float32", "bfloat16", INT8, *WEIGHTS_ONLY),
    any_size=True,
)
TENSORRT = Engine(
    name="tensorrt",
    file="model.plan",
    quantized_file="model.plan",
    device="cuda",
    dtypes=("float32", "float16", "bfloat16", *CALIBRATED),
    any_size=False,
)
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (OPENVINO, TENSORRT)}


def check_dtype(engine: Engine, dtype: str) -> None:
    """Reject a precision that the engine does not have. Raises BadOptionError."""
    if dtype not in engine.dtypes:
        raise BadOptionError(f"--dtype {dtype}: {engine.name} supports {', '.join(engine.dtypes)}")


def check_family(engine: Engine, dtype: str, family: Family) -> None:
    """Reject a precision that the family's denoiser is not quantised to. Raises BadOptionError."""
    has = {each: each not in QUANTIZED or family.denoiser.is_quantized(each) for each in engine.dtypes}
    if not has[dtype]:
        others = ", ".join(each for each in engine.dtypes if has[each])
        raise BadOptionError(f"--dtype {dtype}: not for {family.name} models; {engine.name} serves them in {others}")


def check_lora_rank(dtype: str, rank: int) -> None:
    """Reject a rank pool beside quantised weights. Raises BadOptionError."""
    if rank and dtype in QUANTIZED:
        raise BadOptionError(
            f"--lora-rank, --lora-dir: not with --dtype {dtype}, whose weights cannot change while they are served; "
            "--lora merges each LoRA into weights of its own"
        )


def model_file(engine: Engine, component: Component, dtype: str) -> str:
    """The file that Triton loads for a component of an export in `dtype`."""
    return engine.quantized_file if component.is_quantized(dtype) else engine.file


def is_in_bfloat16(component: Component, dtype: str) -> bool:
    """Whether OpenVINO computes a component in bfloat16 by a hint: what its file is not typed or quantised for.

    Beside int8 it computes in float32: on a CPU with AMX, the shipped UNet's error in OpenVINO 2026.4 is 0.06 then, and
    0.22 with the hint.
    """
    if component.is_quantized(dtype):
        return dtype != INT8
    return dtype != "float32" and not component.is_typed


def read_sizes(text: str) -> tuple[Size, ...]:
    """Parse `512x512,768x768`, without duplicates. Raises BadOptionError."""
    sizes = tuple(dict.fromkeys(_read_size(part) for part in text.split(",")))
    if len(sizes) > MAX_SIZES:
        raise BadOptionError(f"--sizes: {len(sizes)} sizes; at most {MAX_SIZES} can be built")
    return sizes


def choose_sizes(engine: Engine, requested: Sequence[Size], limits: Mapping[str, str]) -> tuple[Size, ...]:
    """The sizes to build: `requested`, else the checkpoint's default; none for an engine that takes any size.

    `limits` are the sampler's parameters from `checkpoint_parameters`. Raises BadOptionError.
    """
    if engine.any_size:
        if requested:
            raise BadOptionError(f"--sizes: {engine.name} takes any size; omit the option")
        return ()
    factor, smallest, largest = (int(limits[name]) for name in ("size_factor", "min_size", "max_size"))
    for width, height in requested:
        if width % factor or height % factor or not smallest <= min(width, height) <= max(width, height) <= largest:
            raise BadOptionError(
                f"--sizes: {width}x{height} does not suit this model; width and height must be multiples of {factor} "
                f"from {smallest} to {largest}"
            )
    return tuple(requested) or ((int(limits["default_width"]), int(limits["default_height"])),)


def size_parameters(sizes: Sequence[Size], limits: Mapping[str, str]) -> dict[str, str]:
    """The sampler's parameters for the sizes that are built; empty if the engine takes any size."""
    if not sizes:
        return {}
    own = (int(limits["default_width"]), int(limits["default_height"]))
    width, height = own if own in sizes else sizes[0]
    return {
        "sizes": ",".join(f"{width}x{height}" for width, height in sizes),
        "default_width": str(width),
        "default_height": str(height),
        "min_size": str(min(min(size) for size in sizes)),
        "max_size": str(max(max(size) for size in sizes)),
        "max_reference_side": str(REFERENCE_SIDES[1]),
    }


def _read_size(text: str) -> Size:
    width, cross, height = text.strip().partition("x")
    # isascii: int() accepts the digits of every script.
    if not (cross and text.isascii() and width.isdecimal() and height.isdecimal()):
        raise BadOptionError(f"--sizes: must be a list of WIDTHxHEIGHT such as 512x512,768x512, not {text[:40]!r}")
    return int(width), int(height)
