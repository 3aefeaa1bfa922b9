"""The wrappers against what diffusers' pipeline does around the same modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from diffusers import UNet2DConditionModel

from hypergen_export.conversion.wrappers.clip import TextEncoder
from hypergen_export.conversion.wrappers.sana import attend_linearly
from hypergen_export.conversion.wrappers.unet import UNet
from hypergen_export.conversion.wrappers.vae import VaeDecoder, VaeEncoder
from support.pipelines import pipeline_of


@pytest.fixture(scope="module")
def pipeline(checkpoint_folder: Path) -> Any:
    return pipeline_of(checkpoint_folder)


@pytest.fixture(scope="module")
def wrapped_unet(checkpoint_folder: Path) -> UNet:
    return UNet(UNet2DConditionModel.from_pretrained(checkpoint_folder / "unet").eval())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_the_text_encoder_gives_the_pipelines_prompt_embeddings(pipeline: Any) -> None:
    expected, _ = pipeline.encode_prompt("a red rocket", "cpu", 1, False)
    ids = pipeline.tokenizer("a red rocket", padding="max_length", max_length=16, return_tensors="pt").input_ids
    rest = (torch.ones(1, 16, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
    torch.testing.assert_close(TextEncoder(pipeline.text_encoder)(ids.to(torch.int32), *rest), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7), (5, 13), (3, 4), (8, 12)])
@torch.no_grad()
def test_the_unet_equals_diffusers_at_sizes_its_levels_divide_and_at_others(
    pipeline: Any, wrapped_unet: UNet, height: int, width: int
) -> None:
    sample, states = noise(2, 4, height, width), noise(2, 16, 32)
    expected = pipeline.unet(sample, 801, states).sample
    time = pipeline.unet.time_proj(torch.tensor([801.0, 801.0]))
    torch.testing.assert_close(wrapped_unet(sample, time, states), expected)


@torch.no_grad()
def test_each_sample_has_its_own_timestep(pipeline: Any, wrapped_unet: UNet) -> None:
    sample, states = noise(3, 4, 8, 8), noise(3, 16, 32)
    time = pipeline.unet.time_proj(torch.tensor([1.0, 400.0, 999.0]))
    together = wrapped_unet(sample, time, states)
    alone = [wrapped_unet(sample[i : i + 1], time[i : i + 1], states[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together, wrapped_unet(sample, time.flip(0), states), atol=1e-3)


@torch.no_grad()
def test_the_decoders_bytes_are_those_of_the_pipelines_image(pipeline: Any) -> None:
    latents = noise(2, 4, 9, 7)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    images = pipeline.image_processor.postprocess(decoded, output_type="pil")
    image, mean = VaeDecoder(pipeline.vae)(latents)
    torch.testing.assert_close(mean[:, 0], decoded.mean(dim=(1, 2, 3)))
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.numpy(), np.stack([np.asarray(each) for each in images]))
    assert image.numpy().std() > 10, "a flat image would prove nothing"


@torch.no_grad()
def test_the_encoder_gives_the_posterior_that_the_pipeline_samples_from(pipeline: Any) -> None:
    pixels = torch.randint(0, 256, (2, 72, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    preprocessed = pipeline.image_processor.preprocess(pixels.numpy().astype(np.float32) / 255)
    posterior = pipeline.vae.encode(preprocessed).latent_dist
    mean, std = VaeEncoder(pipeline.vae)(pixels)
    factor = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(mean, posterior.mean * factor)
    torch.testing.assert_close(std, posterior.std * factor)


class LinearAttention(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_linearly(query, key, value)


def test_a_query_without_anything_positive_attends_to_nothing_in_openvino_too(tmp_path: Path) -> None:
    """It leaves out an addition of 1e-15, as diffusers has it, and would divide 0 by 0."""
    query, key, value = (noise(1, 2, 8, 6) + shift for shift in (0.0, 0.1, 0.2))
    query[:, :, :, 3] = -1.0
    file = tmp_path / "model.onnx"
    names = ["query", "key", "value"]
    torch.onnx.export(
        LinearAttention().eval(), (query, key, value), file, input_names=names, dynamo=True, verbose=False
    )
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answer = compiled(dict(zip(names, (query.numpy(), key.numpy(), value.numpy()), strict=True)))[0]
    assert (answer[:, :, :, 3] == 0).all()
    np.testing.assert_allclose(answer, LinearAttention()(query, key, value), rtol=1e-5, atol=1e-6)
