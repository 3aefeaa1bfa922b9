"""A repository with a plan, as far as check_plans.py looks at it."""

from __future__ import annotations

import json
from pathlib import Path

PLAN = "unet/1/model.plan"


def write_repository(folder: Path) -> None:
    """What an export for a GPU leaves: the plan, its record and the list of files."""
    (folder / PLAN).parent.mkdir(parents=True)
    (folder / PLAN).write_bytes(b"a plan")
    record = {"library": "tensorrt", "version": "11.1.0.106", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
    (folder / f"{PLAN}.json").write_text(json.dumps(record))
    (folder / "hypergen.json").write_text(json.dumps({"files": {PLAN: 6}}))
