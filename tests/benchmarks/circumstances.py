"""On what and with what it was measured: processor, cores, precision, and what the environments hold."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.figures import Figures

TOLD = ("hypergen", "diffusers", "transformers", "torch", "openvino", "openvino-genai", "stable-diffusion-cpp-python")


def circumstances(environments: Path, dtype: str) -> Figures:
    """Figures for the results; of peers' environments, those that are installed."""
    load, _, _ = os.getloadavg()
    entries: Figures = {
        "circumstances_cpu": _cpu(),
        "circumstances_cores": len(os.sched_getaffinity(0)),
        "circumstances_precision_of_ours_the_floor_and_openvino_genai": dtype,
        "circumstances_load_when_the_last_part_ended": round(load, 1),
        "circumstances_last_part_ended": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "circumstances_ours": _versions(None),
    }
    for folder in sorted(environments.glob("*/lib/python3*/site-packages")):
        entries[f"circumstances_environment_{folder.parents[2].name}"] = _versions(folder)
    return entries


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.machine()


def _versions(folder: Path | None) -> str:
    found = importlib.metadata.distributions(path=[str(folder)]) if folder else importlib.metadata.distributions()
    versions = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in found}
    return ", ".join(f"{name} {versions[name]}" for name in TOLD if name in versions)
