"""The configurations, parsed back by the protobuf class that Triton's client ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from hypergen_export.checkpoints.components import FLOAT, Component, Tensor
from hypergen_export.engines.profiles import Shapes
from hypergen_export.repository.config_pbtxt import EngineOptions, component_config, sampler_config

TEMPLATE = Path(__file__).parents[3] / "model_repository" / "diffusion" / "config.pbtxt"
NAMES = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), pb.ModelConfig())


def tensors(entries: Any) -> dict[str, tuple[str, list[int]]]:
    return {entry.name: (pb.DataType.Name(entry.data_type), list(entry.dims)) for entry in entries}


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_component_runs_on_the_cpu_in_openvino(repository: Path, name: str) -> None:
    config = parsed(repository / name / "config.pbtxt")
    assert (config.name, config.backend, config.default_model_filename) == (name, "openvino", "model.onnx")
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching") == (name != "unet"), "the sampler's steps are batches already"
    assert [(group.kind, group.count) for group in config.instance_group] == [(pb.ModelInstanceGroup.KIND_CPU, 1)]
    assert parameters(config) == {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "HINT_BF16": "NO"}


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        (
            "text_encoder",
            {
                "input_ids": ("TYPE_INT32", [16]),
                "attention_mask": ("TYPE_INT32", [16]),
                "clip_skip": ("TYPE_INT32", [1]),
            },
            {"encoder_hidden_states": ("TYPE_FP32", [16, 32])},
        ),
        (
            "unet",
            {
                "sample": ("TYPE_FP32", [4, -1, -1]),
                "time": ("TYPE_FP32", [16]),
                "encoder_hidden_states": ("TYPE_FP32", [-1, 32]),
            },
            {"model_output": ("TYPE_FP32", [4, -1, -1])},
        ),
        (
            "vae_decoder",
            {"latents": ("TYPE_FP32", [4, -1, -1])},
            {"image": ("TYPE_UINT8", [-1, -1, 3]), "pixel_mean": ("TYPE_FP32", [1])},
        ),
        (
            "vae_encoder",
            {"image": ("TYPE_UINT8", [-1, -1, 3])},
            {"mean": ("TYPE_FP32", [4, -1, -1]), "std": ("TYPE_FP32", [4, -1, -1])},
        ),
    ],
)
def test_a_components_tensors_are_those_of_the_table(
    repository: Path, name: str, inputs: object, outputs: object
) -> None:
    config = parsed(repository / name / "config.pbtxt")
    assert tensors(config.input) == inputs
    assert tensors(config.output) == outputs


def test_bfloat16_is_the_backends_hint() -> None:
    component = Component(
        name="one",
        module="one",
        loader="library.One",
        inputs=(Tensor(name="x", dtype=FLOAT, axes=(3,)),),
        outputs=(Tensor(name="y", dtype=FLOAT, axes=(3,)),),
        tolerance=0.1,
    )
    shapes = Shapes(sizes={"vae_scale_factor": 8}, image_sizes=(), rows=2)
    options = EngineOptions(engine="openvino", dtype="bfloat16", shapes=shapes, default_size=(64, 64))
    text = component_config(component, options)
    assert parameters(text_format.Parse(text, pb.ModelConfig()))["HINT_BF16"] == "YES"
    quantized = replace(component, is_typed=True, quantized=("bfloat16",))
    config = text_format.Parse(component_config(quantized, options), pb.ModelConfig())
    assert (config.default_model_filename, parameters(config)["HINT_BF16"]) == ("model.xml", "YES")
    typed = component_config(replace(component, is_typed=True), options)
    assert parameters(text_format.Parse(typed, pb.ModelConfig()))["HINT_BF16"] == "NO", "computed as the file is typed"


@pytest.mark.parametrize(
    ("name", "rows", "dims"),
    [
        ("text_encoder", 2, {"input_ids": [16], "attention_mask": [16], "clip_skip": [1]}),
        ("unet", 2, {"sample": [4, 8, 8], "time": [16], "encoder_hidden_states": [16, 32]}),
        ("vae_decoder", 1, {"latents": [4, 8, 8]}),
    ],
)
def test_components_that_every_image_needs_are_warmed_up_at_the_default_size(
    repository: Path, name: str, rows: int, dims: dict[str, list[int]]
) -> None:
    (warm_up,) = parsed(repository / name / "config.pbtxt").model_warmup
    assert warm_up.batch_size == rows
    assert {key: list(given.dims) for key, given in warm_up.inputs.items()} == dims
    assert all(given.zero_data for given in warm_up.inputs.values())


def test_the_encoder_is_not_warmed_up(repository: Path) -> None:
    assert not parsed(repository / "vae_encoder" / "config.pbtxt").model_warmup


def test_the_sampler_keeps_its_templates_tensors_and_limits(repository: Path) -> None:
    template, config = parsed(TEMPLATE), parsed(repository / "diffusion" / "config.pbtxt")
    assert parameters(template).items() <= parameters(config).items()
    for each in (template, config):
        each.ClearField("parameters")
    assert config == template


def test_the_sampler_knows_its_checkpoint(repository: Path) -> None:
    own = parameters(parsed(repository / "diffusion" / "config.pbtxt")).items() - parameters(parsed(TEMPLATE)).items()
    assert dict(own) == {
        "model_id": "tiny/one",
        "export_key": json.loads((repository / "hypergen.json").read_text())["key"],
        "family": "stable-diffusion",
        "components": "text_encoder,unet,vae_decoder,vae_encoder",
        "text_inputs": json.dumps(
            [
                {
                    "encoder": "text_encoder",
                    "tokenizer": "tokenizer",
                    "inputs": ["input_ids", "attention_mask", "clip_skip"],
                    "outputs": ["encoder_hidden_states"],
                    "segment": 0,
                    "before": "",
                    "after": "",
                    "is_instruction": False,
                    "max_chunks": 16,
                }
            ]
        ),
        "denoiser": "unet",
        "denoiser_inputs": "encoder_hidden_states",
        "max_prompt_tokens": "224",
        "prompt_weightings": "none,a1111,compel",
        "default_prompt_weighting": "none",
        "default_clip_skip": "0",
        "max_clip_skip": "2",
        "default_image_guidance_scale": "0",
        "max_image_guidance_scale": "0",
        "default_skip_layer_guidance_scale": "0",
        "max_skip_layer_guidance_scale": "0",
        "time_width": "16",
        "size_width": "0",
        "flip_sin_to_cos": "1",
        "freq_shift": "0",
        "reverses_time": "0",
        "guidance": "classifier_free",
        "guidance_width": "0",
        "guidance_factor": "1000",
        "is_flow": "0",
        "flow_sigmas": "",
        "flow_shift": "",
        "patch_size": "1",
        "latent_patch_size": "1",
        "encodes_mode": "0",
        "zeros_for_no_negative_prompt": "0",
        "max_references": "0",
        "max_reference_pixels": "0",
        "max_reference_side": "4096",
        "max_reference_rows": "8",
        "preferred_reference_sizes": "",
        "reference_position_step": "0",
        "masked_image_yields": "0",
        "token_width": "4",
        "engine": "openvino",
        "dtype": "float32",
        "device": "cpu",
        "default_width": "64",
        "default_height": "64",
        "size_factor": "8",
        "min_size": "64",
        "max_size": "1024",
        "default_num_inference_steps": "50",
        "default_guidance_scale": "7.5",
        "min_guidance_scale": "1",
        "schedulers": "ddim,ddpm,deis,dpmpp_2m,dpmpp_2m_karras,dpmpp_2m_sde,dpmpp_sde,euler,euler_a,heun,lcm,pndm,tcd,"
        "unipc",
        "default_scheduler": "pndm",
        "latent_channels": "4",
        "vae_scale_factor": "8",
        "max_batch_size": "8",
        "max_cache_interval": "1",
    }


def test_text_that_protobuf_must_escape_survives() -> None:
    unusual = 'a "model" of C:\\new\n日本'
    config = text_format.Parse(sampler_config(TEMPLATE.read_text(), {"model_id": unusual}), pb.ModelConfig())
    assert parameters(config)["model_id"] == unusual
