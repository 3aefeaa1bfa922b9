"""Imports run one way: gateway, exporter and sampler share no Python, and inside each the layers are ordered."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GATEWAY = ROOT / "gateway" / "hypergen_gateway"
EXPORT = ROOT / "export" / "hypergen_export"
SAMPLER = ROOT / "model_repository" / "diffusion" / "1"

HEAVY = {"torch", "diffusers", "transformers", "onnx", "openvino", "tensorrt"}
SAMPLER_NEEDS = {"diffusers", "numpy", "tokenizers", "torch", "triton_python_backend_utils"}

# Each module of the gateway imports only from those before it.
GATEWAY_LAYERS = [
    "options",
    "conformance",
    "errors",
    "request_id",
    "logs",
    "keys",
    "generation",
    "sizes",
    "config",
    "images",
    "faults",
    "threads",
    "bodies",
    "patience",
    "addresses",
    "data_urls",
    "fields",
    "starts",
    "openai",
    "pace",
    "admission",
    "connection",
    "drawing",
    "jobs",
    "callers",
    "responses",
    "events",
    "links",
    "paths",
    "playground",
    "capabilities",
    "s3",
    "openapi",
    "docs",
    "triton",
    "access",
    "browsers",
    "middleware",
    "proxies",
    "connections",
    "metrics",
    "tracing",
    "endpoints",
    "app",
    "embedded",
    "repository",
    "serving",
    "cli",
    "__main__",
]
SAMPLER_LAYERS = [
    "sinusoids",
    "variants",
    "contract",
    "samplers",
    "prompts",
    "conditions",
    "text_cache",
    "estimates",
    "starts",
    "overlay",
    "sampling",
    "stepping",
    "gauges",
    "bls",
    "messages",
    "model",
]


def imported_names(file: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function, dotted."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(file)}


def python_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.py") if "backends" not in file.relative_to(folder).parts)


@pytest.mark.parametrize("file", python_files(GATEWAY), ids=lambda file: str(file.relative_to(GATEWAY)))
def test_the_gateway_imports_neither_the_exporter_nor_a_framework(file: Path) -> None:
    assert not roots(file) & (HEAVY | {"hypergen_export"})


@pytest.mark.parametrize("file", python_files(EXPORT), ids=lambda file: str(file.relative_to(EXPORT)))
def test_the_exporter_never_imports_the_gateway(file: Path) -> None:
    assert "hypergen_gateway" not in roots(file)


@pytest.mark.parametrize("file", python_files(SAMPLER), ids=lambda file: file.name)
def test_the_sampler_needs_nothing_that_a_triton_image_would_not_have(file: Path) -> None:
    foreign = roots(file) - set(sys.stdlib_module_names) - set(SAMPLER_LAYERS)
    assert foreign <= SAMPLER_NEEDS


@pytest.mark.parametrize("layer", GATEWAY_LAYERS)
def test_the_gateways_layers_import_downwards(layer: str) -> None:
    files = python_files(GATEWAY / layer) if (GATEWAY / layer).is_dir() else [GATEWAY / f"{layer}.py"]
    above = set(GATEWAY_LAYERS[GATEWAY_LAYERS.index(layer) + 1 :])
    for file in files:
        used = {name.split(".")[1] for name in imported_names(file) if name.startswith("hypergen_gateway.")}
        assert not used & above, file


@pytest.mark.parametrize("layer", SAMPLER_LAYERS)
def test_the_samplers_layers_import_downwards(layer: str) -> None:
    above = set(SAMPLER_LAYERS[SAMPLER_LAYERS.index(layer) + 1 :])
    assert not roots(SAMPLER / f"{layer}.py") & above


def test_every_module_has_its_layer() -> None:
    gateway = {path.stem for path in GATEWAY.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert gateway - {"__init__"} == set(GATEWAY_LAYERS)
    assert {path.stem for path in SAMPLER.glob("*.py")} == set(SAMPLER_LAYERS)


def test_nothing_imports_the_sampler_at_run_time() -> None:
    for file in [*python_files(GATEWAY), *python_files(EXPORT)]:
        assert not roots(file) & set(SAMPLER_LAYERS), file
