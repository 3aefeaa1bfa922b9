"""SECURITY.md names tests for its claims, and these tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
POLICY = ROOT / ".github" / "SECURITY.md"


def names_in(node: ast.AST) -> dict[str, ast.AST]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {child.name: child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)}


def test_every_test_that_it_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", POLICY.read_text())
    assert len(named) > 20
    for file, path in named:
        node: ast.AST = ast.parse((ROOT / file).read_text())
        for name in path.split("::")[1:]:
            assert name in names_in(node), f"{file}{path}"
            node = names_in(node)[name]


def test_every_claim_of_what_is_defended_names_one() -> None:
    defended = POLICY.read_text().partition("## What is defended")[2].partition("## What is not")[0]
    claims = re.split(r"^- ", defended, flags=re.MULTILINE)[1:]
    assert len(claims) > 15
    assert not [claim for claim in claims if "`tests/" not in claim]
