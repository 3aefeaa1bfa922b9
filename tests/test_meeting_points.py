"""Agreement of gateway, exporter and sampler on the data that they exchange, as they share no code."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hypergen_export.checkpoints import checkpoint as exporter_checkpoint
from hypergen_export.checkpoints.families import FAMILIES
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.checkpoints.family import Family
from hypergen_gateway.embedded import export_cache as repository
from hypergen_gateway.generation.backend import GenerationRequest, ModelDescription
from hypergen_gateway.triton import client as triton
from hypergen_sampler.request import Architecture, Limits

ROOT = Path(__file__).parents[1]
SAMPLER = ROOT / "model_repository" / "diffusion"
PACKAGE = SAMPLER / "1" / "hypergen_sampler"


@pytest.fixture(scope="module")
def template() -> Any:
    return text_format.Parse((SAMPLER / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def strings_of(file: Path) -> set[str]:
    constants = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def parameters_of(repository: Path) -> Any:
    text = (repository / "diffusion" / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig()).parameters


def test_the_gateway_sends_the_inputs_that_the_sampler_declares(template: Any) -> None:
    declared = {entry.name: model_config_pb2.DataType.Name(entry.data_type) for entry in template.input}
    sent = {name: f"TYPE_{datatype.replace('BYTES', 'STRING')}" for name, datatype in triton.INPUT_TYPES.items()}
    assert sent == declared
    assert set(sent) == {field.name for field in dataclasses.fields(GenerationRequest)}


def test_the_sampler_answers_with_the_outputs_that_it_declares(template: Any) -> None:
    declared = {entry.name for entry in template.output}
    assert declared <= strings_of(PACKAGE / "triton_io.py")
    assert set(triton.OUTPUTS) == declared


def test_an_export_carries_every_parameter_that_gateway_and_sampler_read(exported: Path) -> None:
    carried = set(parameters_of(exported))
    assert {field.name for field in dataclasses.fields(ModelDescription)} <= carried
    assert {field.name for field in dataclasses.fields(Limits)} <= carried
    assert {field.name for field in dataclasses.fields(Architecture)} <= carried


def test_command_and_exporter_mean_the_same_model_by_the_shipped_one() -> None:
    assert repository.SHIPPED_MODEL == exporter_checkpoint.SHIPPED_MODEL


def test_an_export_brings_the_files_that_the_sampler_opens(exported: Path) -> None:
    opened = set(re.findall(r'"(\w+\.json)"', "".join(file.read_text() for file in (SAMPLER / "1").rglob("*.py"))))
    assert opened == {"schedulers.json", "loras.json"}
    opened.remove("loras.json")  # written while the model is served
    names = [each["tokenizer"] for each in json.loads(parameters_of(exported)["text_inputs"].string_value)]
    assert all((exported / "diffusion" / file).is_file() for file in (*opened, *(f"{name}.json" for name in names)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_sampler_calls_components_by_their_tensors(family: Family) -> None:
    """Text encoders, the denoiser and its inputs are named by parameters, which the exporter takes from its table."""
    files = ("bls", "conditioning", "lora", "prompts", "references")
    named = {name for file in files for name in strings_of(PACKAGE / f"{file}.py")}
    for component in with_deep_cache(family.components):
        by_parameters = component.is_denoiser or component in family.text_encoders
        assert component.name in named or by_parameters
        assert {tensor.name for tensor in (*component.inputs, *component.outputs)} <= named
