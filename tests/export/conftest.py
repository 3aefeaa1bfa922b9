"""The miniature and its export: most tests only look at one."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import pytest
import torch

from hypergen_export.build import ExportRequest, Outcome, export
from hypergen_export.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.components import STABLE_DIFFUSION, Component

Array = npt.NDArray[Any]
Run = Callable[..., list[Array]]
COMPONENTS = {component.name: component for component in STABLE_DIFFUSION}


@pytest.fixture(scope="session")
def checkpoint_folder(family_of: Callable[[str], tuple[Path, Path]]) -> Path:
    return family_of("sd-1")[0]


@pytest.fixture(scope="session")
def checkpoint(checkpoint_folder: Path) -> Checkpoint:
    return open_checkpoint(str(checkpoint_folder))


@pytest.fixture(scope="session")
def repository(checkpoint_folder: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature in float32 for four images, with the components of `exported`. Read only: copy it."""
    output = Path(shutil.copytree(exported, tmp_path_factory.mktemp("exported") / "repository"))
    outcome = export(ExportRequest(model=str(checkpoint_folder), output=output, max_batch_size=4, model_id="tiny/one"))
    assert outcome == Outcome(reused=tuple(COMPONENTS))
    return output


@pytest.fixture
def checkpoint_copy(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to break. Times are kept, so that its export is still up to date."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


@pytest.fixture
def repository_copy(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "repository"))


@pytest.fixture(scope="session")
def engine(repository: Path) -> Callable[[str], Run]:
    """Component name -> the exported file in OpenVINO: torch tensors in, arrays out."""
    core = openvino.Core()

    @functools.cache
    def load(name: str) -> Run:
        path = repository / name / "1" / "model.onnx"
        compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = COMPONENTS[name].outputs

        def run(*inputs: torch.Tensor) -> list[Array]:
            results = compiled([tensor.numpy() for tensor in inputs])
            return [np.asarray(results[tensor.name]) for tensor in outputs]

        return run

    return load


@pytest.fixture(scope="session")
def components() -> dict[str, Component]:
    return COMPONENTS


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a json file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leftovers(folder: Path) -> list[str]:
    """What an unsuccessful export must not leave in `folder`: anything but what the test itself put there."""
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoint")
