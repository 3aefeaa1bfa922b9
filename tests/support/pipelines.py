"""diffusers' pipelines, as a reference for ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


def pipeline_of(folder: Path, **loaded: Any) -> Any:
    """The pipeline that a checkpoint names, silent: about its missing safety checker, and while it generates.

    `loaded` are parts that need not be read again, as those of another pipeline are the same.
    """
    # Without an argument, it expects the weights of an absent text encoder.
    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name, part in index.items() if part == [None, None] and name.endswith("_3")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent), **loaded)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
