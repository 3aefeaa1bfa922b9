"""The builder of engines that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypergen_export.checkpoints.components import Component
from hypergen_export.engines.profiles import Shapes, profiles
from hypergen_export.engines.tensorrt import Build, Target, rtx_target

# Ampere: an A10, an RTX 3090.
CAPABILITY = "8.6"


@pytest.fixture(scope="session")
def target() -> Target:
    return rtx_target(CAPABILITY)


def make_build(
    component: Component, onnx: Path, plan: Path, shapes: Shapes, target: Target, *, dtype: str = "float32"
) -> Build:
    """Of the engine `plan` for these shapes, from a file with weights of `dtype`."""
    return Build(
        name=component.name,
        onnx=onnx,
        dtype=dtype,
        plan=plan,
        profiles=profiles(component, shapes),
        target=target,
    )
