"""The full-size architectures, with random weights, through the real exporter and the real Triton: time, memory, files.

It knows the architectures' public configs and nothing of their weights. What it shows is that the path carries them
on a machine without a GPU, and what that costs; what it generates is noise. A command, not a test:

    python tests/benchmarks/full_size.py sd-1.5
    python tests/benchmarks/full_size.py sdxl --folder /mnt/large --dtype bfloat16
    python tests/benchmarks/full_size.py sd-1.5 --deep-cache      also what a step costs of which less is computed
    python tests/benchmarks/full_size.py FLUX.2-klein-4B --dtype bfloat16 --folder /mnt/large
    python tests/benchmarks/full_size.py "Stable Diffusion 3.5 Medium" --dtype bfloat16 --without text_encoder_3
    python tests/benchmarks/full_size.py FLUX.1-dev --dtype bfloat16 --holes
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import openvino
import psutil
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.conversion.examples import example_inputs

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.miniature import save_tokenizer
from support.published import PUBLISHED, publish, unet_1_5, unet_xl
from support.transformer_miniatures import MINIATURES, save_transformer_miniature

HYPERGEN = str(Path(sys.executable).parent / "hypergen")
PROMPT = "a red rocket on a blue background"
STEPS_TIMED = 5
PRECISIONS = ("float32", "bfloat16", "int8", "int8-weights", "int4-weights")
BRANCH_ENDS = ("conv2.weight", "to_out.0.weight", "net.2.weight", "proj_out.weight")
BRANCH_SIZE = 0.3

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
_OPENCLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline's class and, by subfolder, what makes each module; tokenizers by subfolder and padding.

    `absent` are the parts that the pipeline can do without, and is told so.
    """

    pipeline: str
    modules: dict[str, Callable[[], torch.nn.Module]]
    tokenizers: dict[str, str]
    absent: tuple[str, ...] = ("feature_extractor", "image_encoder")


def _text_model(kind: type, **config: Any) -> torch.nn.Module:
    module: torch.nn.Module = kind(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **config))
    return module


ARCHITECTURES = {
    "sd-1.5": Architecture(
        pipeline="StableDiffusionPipeline",
        modules={
            "text_encoder": lambda: _text_model(CLIPTextModel, **_CLIP_L),
            "unet": unet_1_5,
            "vae": lambda: AutoencoderKL(sample_size=512, scaling_factor=0.18215, **_VAE),
        },
        tokenizers={"tokenizer": "<|endoftext|>"},
        absent=("feature_extractor", "image_encoder", "safety_checker"),
    ),
    "sdxl": Architecture(
        pipeline="StableDiffusionXLPipeline",
        modules={
            "text_encoder": lambda: _text_model(CLIPTextModel, **_CLIP_L),
            "text_encoder_2": lambda: _text_model(CLIPTextModelWithProjection, **_OPENCLIP_G),
            "unet": unet_xl,
            "vae": lambda: AutoencoderKL(sample_size=1024, scaling_factor=0.13025, **_VAE),
        },
        tokenizers={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    ),
}


# Those that are published in bfloat16, in files of at most 5 GB.
TRANSFORMERS = [name for name, (miniature, _) in PUBLISHED.items() if miniature in MINIATURES]
# What an export imports, whatever the model.
_IMPORTS = "import hypergen_export.conversion.convert, hypergen_export.conversion.wrappers, onnxscript, openvino"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds, and the largest memory of a command and all its children together, in GB (resident, and private)."""

    seconds: float
    resident: float
    private: float
    output: str


def main() -> None:
    """Write the checkpoint, export it, serve it for one step, and print what each took."""
    options = _options()
    if options.checkpoint:
        save_checkpoint(options.checkpoint, ARCHITECTURES[options.architecture])
        return
    folder = Path(tempfile.mkdtemp(prefix="full-size-", dir=options.folder))
    try:
        _report(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _report(folder: Path, options: argparse.Namespace) -> None:
    checkpoint, repository = folder / "checkpoint", folder / "repository"
    if options.architecture in TRANSFORMERS:
        _publish(folder / "miniature", checkpoint, options)
    else:
        parameters = save_checkpoint(checkpoint, ARCHITECTURES[options.architecture])
        counts = ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in parameters.items())
        print(f"{options.architecture}: {counts}", flush=True)
    largest = max(path.stat().st_size for path in checkpoint.rglob("*.safetensors")) / 1e9
    imports = measure((sys.executable, "-c", _IMPORTS)).resident

    export = (sys.executable, "-m", "hypergen_export", str(checkpoint), "--output", str(repository))
    cost = measure([*export, "--dtype", options.dtype, *(["--deep-cache"] if options.deep_cache else [])])
    print(cost.output)
    _print_cost("export", cost)
    above = cost.resident - imports
    print(
        f"{above:.2f} GB above imports ({imports:.2f} GB): {above / largest:.2f} of the largest file, {largest:.2f} GB"
    )
    if options.deep_cache:
        _print_steps(open_checkpoint(str(checkpoint)), repository, options)
    shutil.rmtree(checkpoint)
    for path in sorted(repository.glob("*/1/*")):
        if path.stat().st_size > 1e6:
            linked = ", linked" if path.suffix == ".safetensors" and path.name != "model.onnx.safetensors" else ""
            print(f"{path.relative_to(repository)}: {path.stat().st_size / 1e9:,.3f} GB{linked}")
    record = json.loads((repository / "hypergen.json").read_text())
    for name, entry in record["components"].items():
        print(f"{name}: differs from torch by {entry['parity']['difference']:.1e}", flush=True)
    if options.export_only or options.holes:
        return

    image = (HYPERGEN, "generate", PROMPT, "--model", str(repository), "--output", str(folder / "image.png"))
    cost = measure([*image, "--steps", "1", "--size", options.size])
    print(cost.output)
    _print_cost(f"start and one image of {options.size} in one step", cost)


def _publish(miniature: Path, checkpoint: Path, options: argparse.Namespace) -> None:
    """The checkpoint with random weights, or with none in files that take no space."""
    save_transformer_miniature(miniature, PUBLISHED[options.architecture][0])
    began = time.monotonic()
    publish(options.architecture, miniature, checkpoint, has_values=not options.holes, without=options.without or ())
    files = sorted(checkpoint.glob("*/*.safetensors"))
    sizes = ", ".join(f"{path.parent.name} {path.stat().st_size / 1e9:,.2f}" for path in files)
    print(f"{options.architecture}, in GB: {sizes}; written in {time.monotonic() - began:,.0f} s", flush=True)


def _print_steps(checkpoint: Checkpoint, repository: Path, options: argparse.Namespace) -> None:
    """The UNet's share of a step in OpenVINO: with guidance and without, whole and with deep features reused."""
    width, height = (int(side) // checkpoint.sizes["vae_scale_factor"] for side in options.size.split("x"))
    unets = [each for each in with_deep_cache(checkpoint.family.components) if each.module == "unet"]
    engines = {each: _engine(repository / each.name / "1" / "model.onnx", options.dtype) for each in unets}
    seconds: dict[tuple[str, int], list[float]] = {}
    for run in range(STEPS_TIMED + 1):
        for unet, rows in product(unets, (2, 1)):
            inputs = example_inputs(unet, checkpoint.sizes, batch=rows, height=height, width=width)
            began = time.perf_counter()
            engines[unet].infer({tensor.name: one.numpy() for tensor, one in zip(unet.inputs, inputs, strict=True)})
            if run > 0:  # the first warms up
                seconds.setdefault((unet.name, rows), []).append(time.perf_counter() - began)
    whole = statistics.median(seconds["unet", 2])
    for (name, rows), found in seconds.items():
        one = statistics.median(found)
        print(f"{name}, {rows} rows at {options.size}: {one:.3f} s, {one / whole:.2f} of a guided step")


def _engine(file: Path, dtype: str) -> Any:
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    return openvino.Core().compile_model(file, "CPU", settings).create_infer_request()


def save_checkpoint(folder: Path, architecture: Architecture) -> dict[str, int]:
    """Write a checkpoint with random weights in float16; returns each module's number of parameters."""
    counts: dict[str, int] = {}
    classes: dict[str, list[str | None]] = {}
    for name, make in architecture.modules.items():
        with torch.device("meta"):
            module = make().half()
        module = _filled(module.to_empty(device="cpu"))
        classes[name] = [type(module).__module__.partition(".")[0], type(module).__name__]
        counts[name] = sum(parameter.numel() for parameter in module.parameters())
        module.save_pretrained(folder / name)  # type: ignore[operator]
    for name, pad_token in architecture.tokenizers.items():
        save_tokenizer(folder / name, pad_token, positions=77)
        classes[name] = ["transformers", "CLIPTokenizer"]
    classes |= {name: [None, None] for name in architecture.absent}
    index = {"_class_name": architecture.pipeline, "scheduler": ["diffusers", _EULER["_class_name"]], **classes}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_EULER))
    (folder / "model_index.json").write_text(json.dumps(index))
    return counts


def _filled(module: torch.nn.Module) -> torch.nn.Module:
    """Weights whose layers keep about the size of what goes through them, as initialisation has it.

    Those that a residual branch ends with are smaller, as if trained: else what is rounded in all the branches adds up,
    and eight bits would be refused.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            size = BRANCH_SIZE if name.endswith(BRANCH_ENDS) else 1.0
            parameter.data.normal_(0.0, size * parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def measure(command: Sequence[str]) -> Cost:
    """Run it and watch its memory. Raises SystemExit with its output where it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    samples: list[tuple[int, int]] = [(0, 0)]
    watcher = threading.Thread(target=_watch, args=(process, samples), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{output}\n{command[0]} ended with {process.returncode}")
    resident, private = (max(values) / 1e9 for values in zip(*samples, strict=True))
    return Cost(seconds=time.monotonic() - began, resident=resident, private=private, output=output.strip())


def _watch(process: subprocess.Popen[str], samples: list[tuple[int, int]]) -> None:
    """Twice a second: resident memory and, of it, what no file backs. Mapped weights are in the first alone."""
    while process.poll() is None:
        infos = []
        try:
            root = psutil.Process(process.pid)
            infos = [each.memory_info() for each in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            pass
        samples.append((sum(info.rss for info in infos), sum(info.rss - info.shared for info in infos)))
        time.sleep(0.5)


def _print_cost(what: str, cost: Cost) -> None:
    print(f"{what}: {cost.seconds:,.0f} s, {cost.resident:,.1f} GB resident, {cost.private:,.1f} GB of it private")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export and serve a full-size architecture with random weights.")
    parser.add_argument("architecture", choices=sorted([*ARCHITECTURES, *TRANSFORMERS]))
    parser.add_argument("--folder", type=Path, help="where to work; sdxl needs 25 GB there  [default: the system's]")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of the engines")
    parser.add_argument("--size", default="512x512", help="of the image  [default: 512x512]")
    parser.add_argument("--checkpoint", type=Path, help="write the checkpoint there and do no more")
    parser.add_argument("--deep-cache", action="store_true", help="with a shallow UNet; time whole and shallow steps")
    parser.add_argument("--without", action="append", help="of a transformer's checkpoint: a module that it may lack")
    parser.add_argument("--holes", action="store_true", help="of a transformer: files without values; exports alone")
    parser.add_argument("--export-only", action="store_true", help="do not serve")
    parser.add_argument("--keep", action="store_true", help="leave the repository there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
