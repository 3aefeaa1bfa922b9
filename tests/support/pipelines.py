"""diffusers' pipelines, as a reference for ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


def pipeline_of(folder: Path) -> Any:
    """The pipeline that a checkpoint names, silent: about its missing safety checker, and while it generates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
