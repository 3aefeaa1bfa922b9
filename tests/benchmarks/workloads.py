"""The checkpoints that every target is measured with: the shipped model, and a full-size one with random weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from benchmarks.environments import ROOT, ToolError, run
from benchmarks.targets import GenerationRequest, Limits

SHIPPED = ROOT / "export" / "emoji" / "checkpoint"
FLOW = ROOT / "export" / "emoji_flow" / "checkpoint"
SECONDS_TO_MAKE = 900


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A checkpoint in diffusers' layout, and the requests for it.

    `request` is the usual image; `sizes` are other squares that the model can generate; `limits` suit the
    slowest target.
    """

    name: str
    checkpoint: Path
    request: GenerationRequest
    sizes: tuple[int, ...]
    limits: Limits

    def requests(self, steps: int | None = None, size: int | None = None) -> Iterator[GenerationRequest]:
        """Endless requests with different prompts and seeds, so that no prompt cache skips the text encoder."""
        prompts = _prompts(self.checkpoint)
        request = replace(self.request, steps=steps or self.request.steps)
        if size:
            request = replace(request, width=size, height=size)
        for number in count():
            yield replace(request, prompt=f"{prompts[number % len(prompts)]} {number}", seed=number)

    @property
    def latent_channels(self) -> int:
        channels: int = json.loads((self.checkpoint / "unet" / "config.json").read_text())["in_channels"]
        return channels


def _prompts(checkpoint: Path) -> list[str]:
    defaults = checkpoint / "hypergen_defaults.json"
    suggested: list[str] = json.loads(defaults.read_text())["suggestions"] if defaults.exists() else []
    return suggested or ["a red rocket on a blue background", "a green cat on a red background"]


def shipped() -> Workload:
    """The model that ships with the project, with its defaults: 64×64, 10 steps of DDIM, guidance 2."""
    return Workload(
        name="shipped",
        checkpoint=SHIPPED,
        request=GenerationRequest(prompt="", width=64, height=64, steps=10, guidance=2.0, seed=0),
        sizes=(56, 64, 72, 80, 96),
        limits=Limits(load=600, image=120),
    )


def flow() -> Workload:
    """The transformer that ships with the project, with its defaults: 64×64, 10 flow steps, guidance 1.5."""
    return Workload(
        name="flow",
        checkpoint=FLOW,
        request=GenerationRequest(prompt="", width=64, height=64, steps=10, guidance=1.5, seed=0),
        sizes=(64,),
        limits=Limits(load=600, image=120),
    )


def sd15(work: Path, steps: int) -> Workload:
    """Stable Diffusion 1.5's architecture with random weights, created on first use; Euler, guidance 7.5."""
    checkpoint = work / "checkpoints" / "sd15"
    if not (checkpoint / "model_index.json").exists():
        print(f"Making a checkpoint of Stable Diffusion 1.5's size in {checkpoint}", file=sys.stderr)
        script = ROOT / "tests" / "benchmarks" / "full_size.py"
        run([sys.executable, str(script), "sd-1.5", "--checkpoint", str(checkpoint)], SECONDS_TO_MAKE)
    return Workload(
        name="sd15",
        checkpoint=checkpoint,
        request=GenerationRequest(prompt="", width=512, height=512, steps=steps, guidance=7.5, seed=0),
        sizes=(512,),
        limits=Limits(load=1800, image=600),
    )


def cache(workload: Workload, work: Path) -> Path:
    """The cache folder of `hypergen serve` for this workload; it depends on the checkpoint's name and path."""
    place = hashlib.sha256(str(workload.checkpoint.resolve()).encode()).hexdigest()[:8]
    return work / "cache" / f"{workload.name}-{place}"


def repository(workload: Workload, dtype: str, work: Path) -> Path:
    """The exported model repository. Raises ToolError if the server has not been started with the workload yet."""
    found = [record.parent for record in cache(workload, work).glob(f"*-{dtype}-*/hypergen.json")]
    if len(found) != 1:
        raise ToolError(f"{len(found)} exports of {workload.name} in {cache(workload, work)}, expected one")
    return found[0]


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, in which case it is the server's default."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in (" avx512_bf16", " amx_bf16"))
