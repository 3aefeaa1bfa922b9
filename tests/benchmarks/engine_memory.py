"""GPU memory: the estimate for published architectures, and what TensorRT-RTX states for layers of their widths.

Needs no GPU and no weights. A command, not a test:

    python tests/benchmarks/engine_memory.py                        the table of docs/production.md
    python tests/benchmarks/engine_memory.py --measure FLUX.1-dev   one layer of each kind, built; minutes and 14 GB

A layer's activations are those of the whole model, since layers take turns with the same memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.conversion.linking import WeightFiles
from hypergen_export.conversion.loading import load_placeholders
from hypergen_export.conversion.onnx import Weights, capture, write_onnx
from hypergen_export.conversion.wrappers import wrap
from hypergen_export.engines import tensorrt
from hypergen_export.engines.memory import Model
from hypergen_export.engines.profiles import Shapes, profiles
from hypergen_export.engines.profiles import shapes_of as engine_shapes
from support.miniature import save_miniature
from support.published import PUBLISHED, publish, replace_module
from support.transformer_miniatures import MINIATURES, save_transformer_miniature

DTYPE = "bfloat16"
CAPABILITY = "8.6"
# Configs' numbers of layers, and to how many a module is cut before it is measured.
CUT = {
    "num_layers": 1,
    "num_single_layers": 1,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "dual_attention_layers": (),
}


def main() -> None:
    """Print the table, or what one denoiser's engine needs."""
    parser = argparse.ArgumentParser(description="GPU memory of published architectures.")
    parser.add_argument("--measure", choices=sorted(PUBLISHED), help="build a layer of each kind of this denoiser")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.measure:
            measure(options.measure, Path(folder))
            return
        for name in PUBLISHED:
            print_row(name, Path(folder) / name)


def print_row(name: str, folder: Path) -> None:
    """A row of the table: weights by part, then the total for one and four images in a call."""
    checkpoint = published(name, folder)
    model = Model(checkpoint=checkpoint, components=checkpoint.family.components, dtype=DTYPE)
    weights = {need.name: need.weights / 2**30 for need in model.needs(shapes_of(name, checkpoint, rows=2))}
    denoiser = weights.pop(checkpoint.family.denoiser.name)
    vae = weights.pop("vae_decoder") + weights.pop("vae_encoder")
    totals = [model.total(shapes_of(name, checkpoint, rows=rows)) / 2**30 for rows in (2, 8)]
    figures = [f"{figure:.1f}" for figure in (sum(weights.values()), denoiser, vae, *totals)]
    print(f"| {name} | {' | '.join(figures)} |", flush=True)


def published(name: str, folder: Path) -> Checkpoint:
    """The checkpoint without its weights."""
    miniature = PUBLISHED[name][0]
    made = folder.with_name(f"{folder.name}-miniature")
    if miniature in MINIATURES:
        save_transformer_miniature(made, miniature)
    else:
        save_miniature(made, family=miniature)
    return open_checkpoint(str(publish(name, made, folder)))


def shapes_of(name: str, checkpoint: Checkpoint, rows: int) -> Shapes:
    """One size, as the table has it."""
    side = 512 if name == "Stable Diffusion 1.5" else 1024
    return engine_shapes(checkpoint, ((side, side),), rows)


def measure(name: str, folder: Path) -> None:
    """Build the denoiser, cut to a layer of each kind, and print what its engine reserves beside the estimate."""
    checkpoint = published(name, folder / "checkpoint")
    shapes = shapes_of(name, checkpoint, rows=2)
    component = checkpoint.family.denoiser
    (need,) = Model(checkpoint=checkpoint, components=[component], dtype=DTYPE).needs(shapes)
    make = PUBLISHED[name][1][component.module]
    module_folder = checkpoint.folder / component.module
    replace_module(module_folder, _cut(make))
    onnx = folder / "onnx" / "model.onnx"
    onnx.parent.mkdir()
    module, placeholders = load_placeholders(checkpoint, component)
    placeholders.cast(module, getattr(torch, DTYPE))
    program = capture(component, wrap(component, module), checkpoint.sizes)
    files = WeightFiles(onnx, casts=True)
    write_onnx(component, program, onnx, Weights(placeholders, files, getattr(torch, DTYPE)))
    stated = activations_of(
        tensorrt.Build(
            name=name,
            onnx=onnx,
            dtype=DTYPE,
            plan=folder / "model.plan",
            profiles=profiles(component, shapes),
            target=tensorrt.rtx_target(CAPABILITY),
        )
    )
    print(f"{name}: estimated {need.activations:,} bytes, TensorRT-RTX states {stated:,}")


def _cut(make: Callable[[], torch.nn.Module]) -> Any:
    with torch.device("meta"):
        whole: Any = make()
        known = {key: value for key, value in CUT.items() if key in whole.config}
        return type(whole).from_config({**whole.config, **known})


def activations_of(build: tensorrt.Build) -> int:
    """What the builder logs about the engine's activations."""
    said: list[str] = []
    make_log = tensorrt._make_log

    def listening(trt: Any) -> Any:
        class Log(type(make_log(trt))):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                said.append(message)
                super().log(severity, message)

        return Log()

    tensorrt._make_log = listening
    try:
        tensorrt.build_plan(build, lambda _: None)
    finally:
        tensorrt._make_log = make_log
    (line,) = (line for line in said if line.startswith("Total Activation Memory"))
    return int(line.split()[3])


if __name__ == "__main__":
    main()
