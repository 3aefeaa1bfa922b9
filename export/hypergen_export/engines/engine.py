"""What a repository can be exported for: one row per engine, and which options go with it.

Data and checks alone: nothing heavy is imported, so that a wrong option is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypergen_export.errors import BadOptionError

# Width and height in pixels.
Size = tuple[int, int]

# Each size is a profile with memory of its own on the GPU, and a build of its own.
MAX_SIZES = 16


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`name` is Triton's backend, `file` what it loads, `device` where it runs; `any_size`: shapes are free."""

    name: str
    file: str
    device: str
    dtypes: tuple[str, ...]
    any_size: bool


OPENVINO = Engine(
    name="openvino",
    file="model.onnx",
    device="cpu",
    dtypes=("float32", "bfloat16"),
    any_size=True,
)
TENSORRT = Engine(
    name="tensorrt",
    file="model.plan",
    device="cuda",
    dtypes=("float32", "float16", "bfloat16"),
    any_size=False,
)
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (OPENVINO, TENSORRT)}


def check_dtype(engine: Engine, dtype: str) -> None:
    """Refuse what the engine does not compute in. Raises BadOptionError."""
    if dtype not in engine.dtypes:
        raise BadOptionError(f"--dtype {dtype}: {engine.name} computes in {' or '.join(engine.dtypes)}")


def read_sizes(text: str) -> tuple[Size, ...]:
    """`512x512,768x768` as widths and heights, each once. Raises BadOptionError."""
    sizes = tuple(dict.fromkeys(_read_size(part) for part in text.split(",")))
    if len(sizes) > MAX_SIZES:
        raise BadOptionError(f"--sizes: {len(sizes)} sizes, but at most {MAX_SIZES} can be built in")
    return sizes


def choose_sizes(engine: Engine, asked: Sequence[Size], limits: Mapping[str, str]) -> tuple[Size, ...]:
    """The sizes to build in: those asked for, else the checkpoint's own; none for an engine that takes any.

    `limits` are the sampler's parameters, as `defaults` makes them. Raises BadOptionError.
    """
    if engine.any_size:
        if asked:
            raise BadOptionError(f"--sizes: {engine.name} draws every size; leave the option out")
        return ()
    factor, smallest, largest = (int(limits[name]) for name in ("size_factor", "min_size", "max_size"))
    for width, height in asked:
        if width % factor or height % factor or not smallest <= min(width, height) <= max(width, height) <= largest:
            raise BadOptionError(
                f"--sizes: {width}x{height} is no size of this model, whose sides are multiples of {factor} "
                f"from {smallest} to {largest}"
            )
    return tuple(asked) or ((int(limits["default_width"]), int(limits["default_height"])),)


def size_parameters(sizes: Sequence[Size], limits: Mapping[str, str]) -> dict[str, str]:
    """The sampler's parameters that follow from the sizes built in; the checkpoint's own where any can be drawn."""
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
    }


def _read_size(text: str) -> Size:
    width, cross, height = text.strip().partition("x")
    # isascii: int() reads the digits of every script, and nobody else does.
    if not (cross and text.isascii() and width.isdecimal() and height.isdecimal()):
        raise BadOptionError(f"--sizes: must be WIDTHxHEIGHT and so on, such as 512x512,768x512, not {text[:40]!r}")
    return int(width), int(height)
