"""`make audit` passes only if every package was looked up."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit"
FINE = {"name": "click", "version": "8.5.1", "vulns": []}
HOLE = {"name": "x", "version": "1", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["2"]}]}
# As pip-audit writes it where a registry does not tell; it ends with 0 then.
UNKNOWN = {"name": "starlette", "skip_reason": "Dependency not found on PyPI and could not be audited"}
OURS = {"name": "hypergen-triton", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    loader = SourceFileLoader("audit", str(SCRIPT))
    spec = spec_from_loader("audit", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "code"),
    [
        ([FINE, OURS], 0),
        ([FINE, HOLE], 1),
        ([FINE, UNKNOWN], 2),
        ([UNKNOWN], 2),
        ([HOLE, UNKNOWN], 1),
        ([OURS], 1),
        ([], 1),
    ],
)
def test_the_exit_code_says_what_is_known(
    audit: ModuleType, capsys: pytest.CaptureFixture[str], packages: list[dict[str, Any]], code: int
) -> None:
    assert audit.judge(packages) == code
    said = capsys.readouterr()
    assert ("NOT AUDITED" in said.err) == (code == 2)
    assert ("x 1: PYSEC-2026-1, mended in 2" in said.out) == (HOLE in packages)
