"""A checkpoint is data of whoever made it: nothing in it is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.conversion.loading import load_module
from hypergen_export.errors import BrokenCheckpointError, ExportError

from ..conftest import COMPONENTS

OPENED = pytest.mark.parametrize(
    ("name", "weights", "pickled"),
    [
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ],
)


@pytest.fixture
def folder(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_of("sd-1"), tmp_path / "checkpoint"))


class MaliciousPickle:
    """What runs when it is unpickled: the trace it leaves is a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def pickle_into(file: Path, content: object) -> None:
    torch.save(content, file)


@OPENED
def test_a_pickle_that_would_run_something_is_refused(folder: Path, name: str, weights: str, pickled: str) -> None:
    component, trace = COMPONENTS[name], folder / "trace"
    module = folder / component.module
    tensors = load_file(module / weights)
    (module / weights).unlink()
    pickle_into(module / pickled, {**tensors, "burglar": MaliciousPickle(trace)})
    with pytest.raises(BrokenCheckpointError, match="cannot be loaded"):
        load_module(open_checkpoint(str(folder)), component)
    assert not trace.exists()
    pickle_into(module / pickled, tensors)  # that is what was refused, not the format
    load_module(open_checkpoint(str(folder)), component)


@OPENED
def test_beside_safetensors_no_pickle_is_opened(folder: Path, name: str, weights: str, pickled: str) -> None:
    component, trace = COMPONENTS[name], folder / "trace"
    assert (folder / component.module / weights).exists()
    pickle_into(folder / component.module / pickled, MaliciousPickle(trace))
    load_module(open_checkpoint(str(folder)), component)
    assert not trace.exists()


def code_files(folder: Path) -> Iterable[Path]:
    """Where a repository of the hub may keep code of its own."""
    return [folder / "pipeline.py", *(folder / part / "model.py" for part in ("unet", "vae", "text_encoder"))]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("_class_name", ["pipeline", "OwnPipeline"]),
        ("_class_name", "OwnPipeline"),
        ("unet", ["model", "OwnUNet"]),
        ("vae", ["os", "system"]),
        ("text_encoder", ["transformers", "../model"]),
    ],
)
def test_no_code_that_comes_with_a_checkpoint_is_imported(folder: Path, part: str, value: object) -> None:
    trace = folder / "trace"
    for file in code_files(folder):
        file.write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass OwnUNet: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: value}))
    with pytest.raises(ExportError):
        open_checkpoint(str(folder))
    assert not trace.exists()


def test_a_config_that_points_to_code_changes_nothing(folder: Path) -> None:
    trace = folder / "trace"
    for file in code_files(folder):
        file.write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass OwnUNet: pass\n")
    for name in ("unet", "text_encoder"):
        path = folder / COMPONENTS[name].module / "config.json"
        config = json.loads(path.read_text()) | {"auto_map": {"AutoModel": "model.OwnUNet"}, "trust_remote_code": True}
        path.write_text(json.dumps(config))
        load_module(open_checkpoint(str(folder)), COMPONENTS[name])
    assert not trace.exists()
