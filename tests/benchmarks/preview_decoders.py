"""What decoding a preview takes: the VAE of Stable Diffusion 1.5 beside an AutoencoderTiny of TAESD's size.

Both have random weights. They are exported beside a miniature, and run in OpenVINO by turns. A command, not a test:

    python tests/benchmarks/preview_decoders.py --size 512x512 --runs 7
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openvino
import torch
from diffusers import AutoencoderTiny

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.full_size import ARCHITECTURES, HYPERGEN
from support.miniature import save_miniature

DECODERS = ("vae_decoder", "preview_decoder")
HINTS = {"float32": "f32", "bfloat16": "bf16"}


def main() -> None:
    """Export both, and print the median time of each."""
    options = _options()
    width, height = (int(side) // 8 for side in options.size.split("x"))
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0)).numpy()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[options.dtype]}
    seconds: dict[str, list[float]] = {name: [] for name in DECODERS}
    with tempfile.TemporaryDirectory() as folder:
        repository = _export(Path(folder))
        engines = {
            name: openvino.Core().compile_model(repository / name / "1" / "model.onnx", "CPU", settings)
            for name in DECODERS
        }
        for _ in range(options.runs + 1):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine({"latents": latents})
                seconds[name].append(time.perf_counter() - began)
    vae, tiny = (statistics.median(seconds[name][1:]) for name in DECODERS)  # the first warms up
    print(f"{options.size}, {options.dtype}, median of {options.runs}:")
    print(f"{vae * 1000:.0f} ms by the VAE, {tiny * 1000:.0f} ms by the AutoencoderTiny, {tiny / vae:.3f} of it")


def _export(folder: Path) -> Path:
    save_miniature(folder / "model")
    ARCHITECTURES["sd-1.5"].modules["vae"]().save_pretrained(folder / "vae")  # type: ignore[operator]
    AutoencoderTiny().save_pretrained(folder / "tiny")
    parts = ["--vae", str(folder / "vae"), "--preview-vae", str(folder / "tiny")]
    command = [HYPERGEN, "export", str(folder / "model"), "--output", str(folder / "repository"), *parts]
    subprocess.run(command, check=True)
    return folder / "repository"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--dtype", choices=sorted(HINTS), default="float32")
    parser.add_argument("--runs", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
