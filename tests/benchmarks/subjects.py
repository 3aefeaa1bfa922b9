"""The checkpoints that all contenders draw with: the shipped one, and a full-size architecture with random weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from benchmarks.contenders import GenerationRequest, Limits
from benchmarks.environments import ROOT, ToolError, run

SHIPPED = ROOT / "export" / "emoji" / "checkpoint"
SECONDS_TO_MAKE = 900


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A checkpoint in diffusers' layout and what is drawn with it.

    `wish` is the usual picture; `sizes` are other squares that the model can draw; `limits` suit the slowest contender.
    """

    name: str
    checkpoint: Path
    wish: GenerationRequest
    sizes: tuple[int, ...]
    limits: Limits

    def wishes(self, steps: int | None = None, size: int | None = None) -> Iterator[GenerationRequest]:
        """One after the other, no two alike: prompts differ, so that no cache of prompts answers for the model."""
        prompts = _prompts(self.checkpoint)
        wish = replace(self.wish, steps=steps or self.wish.steps)
        if size:
            wish = replace(wish, width=size, height=size)
        for number in count():
            yield replace(wish, prompt=f"{prompts[number % len(prompts)]} {number}", seed=number)

    @property
    def latent_channels(self) -> int:
        channels: int = json.loads((self.checkpoint / "unet" / "config.json").read_text())["in_channels"]
        return channels


def _prompts(checkpoint: Path) -> list[str]:
    defaults = checkpoint / "hypergen_defaults.json"
    suggested: list[str] = json.loads(defaults.read_text())["suggestions"] if defaults.exists() else []
    return suggested or ["a red rocket on a blue background", "a green cat on a red background"]


def shipped() -> Workload:
    """The model that ships with the project, as it is asked by default: 64×64, 10 steps of DDIM, guidance 2."""
    return Workload(
        name="shipped",
        checkpoint=SHIPPED,
        wish=GenerationRequest(prompt="", width=64, height=64, steps=10, guidance=2.0, seed=0),
        sizes=(56, 64, 72, 80, 96),
        limits=Limits(load=600, picture=120),
    )


def sd15(work: Path, steps: int) -> Workload:
    """Stable Diffusion 1.5's architecture with random weights, made where it is not there yet; Euler, guidance 7.5."""
    checkpoint = work / "checkpoints" / "sd15"
    if not (checkpoint / "model_index.json").exists():
        print(f"Making a checkpoint of Stable Diffusion 1.5's size in {checkpoint}", file=sys.stderr)
        script = ROOT / "tests" / "benchmarks" / "full_size.py"
        run([sys.executable, str(script), "sd-1.5", "--checkpoint", str(checkpoint)], SECONDS_TO_MAKE)
    return Workload(
        name="sd15",
        checkpoint=checkpoint,
        wish=GenerationRequest(prompt="", width=512, height=512, steps=steps, guidance=7.5, seed=0),
        sizes=(512,),
        limits=Limits(load=1800, picture=600),
    )


def cache(subject: Workload, work: Path) -> Path:
    """Where `hypergen serve` is to keep the subject's exports: a folder for the checkpoint of that name and place."""
    place = hashlib.sha256(str(subject.checkpoint.resolve()).encode()).hexdigest()[:8]
    return work / "cache" / f"{subject.name}-{place}"


def repository(subject: Workload, dtype: str, work: Path) -> Path:
    """The subject as ours serves it. Raises ToolError where ours has not been started with it yet."""
    found = [record.parent for record in cache(subject, work).glob(f"*-{dtype}-*/hypergen.json")]
    if len(found) != 1:
        raise ToolError(f"{len(found)} exports of {subject.name} in {cache(subject, work)}: it wants one")
    return found[0]


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, and so whether ours takes it by default."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in (" avx512_bf16", " amx_bf16"))
