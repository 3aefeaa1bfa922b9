"""Import rules: import-linter's contracts in pyproject.toml, and rules that they cannot express."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from support.project import PYPROJECT

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("gateway", "export", "model_repository/diffusion/1")
SAMPLER = ROOT / "model_repository" / "diffusion" / "1"
# What the image of NVIDIA's Triton is given, beside the standard library.
SAMPLER_NEEDS = {"diffusers", "hypergen_sampler", "numpy", "tokenizers", "torch", "triton_python_backend_utils"}


def test_every_contract_is_kept() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in SOURCE_ROOTS)}
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    linted = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def imported_roots(file: Path) -> Iterator[str]:
    """The top-level package of every import of a file, also of those inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("file", sorted(SAMPLER.rglob("*.py")), ids=lambda file: file.name)
def test_the_sampler_needs_nothing_that_a_triton_image_would_not_have(file: Path) -> None:
    assert set(imported_roots(file)) - set(sys.stdlib_module_names) <= SAMPLER_NEEDS


def test_every_package_that_the_exporter_imports_is_declared() -> None:
    """Others bring it today, and may bring it no more, or an older one."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["export"], *extras["int8"]]
    declared = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
    files = (ROOT / "export" / "hypergen_export").rglob("*.py")
    roots = {root for file in files for root in imported_roots(file)} - set(sys.stdlib_module_names)
    distributions = packages_distributions()
    undeclared = {
        root
        for root in roots - {"hypergen_export", "google"}  # protobuf is the one that tritonclient was generated for
        if not declared & {name.lower().replace("_", "-") for name in distributions.get(root, ())}
    }
    assert undeclared == set()
