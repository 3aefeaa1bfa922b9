"""The way to TensorRT on a real GPU: built, loaded, held against torch, timed. In the order of a first use."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import np_to_triton_dtype

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import BYTE, Component, Tensor
from hypergen_export.conversion.examples import as_kwargs, example_inputs
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.wrappers import wrap
from support.running_server import Pixels, Server, generate, generate_all

from .conftest import IMAGES, SIZE, Plans, Triton

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]

STEPS = 20
FIELDS: dict[str, Any] = {
    "prompt": "a lighthouse at dusk",
    "seed": 5,
    "num_inference_steps": STEPS,
    "guidance_scale": 7.5,
}
REPEATS = 5
# Root mean square over float16's roundings, relative to the largest magnitude; of an image in levels of 255.
ROUNDING, LEVELS = 0.01, 2.0
# Both sides round in float16, in another order, over all steps.
IMAGE = 5.0


def test_plans_are_built(plans: Plans, figures: dict[str, str]) -> None:
    found = sorted(plans.repository.glob("*/1/model.plan"))
    assert found
    sizes = ", ".join(f"{plan.parts[-3]} {plan.stat().st_size / 1e9:.2f} GB" for plan in found)
    figures["export and build"] = f"{plans.cost.seconds:.0f} s, {plans.cost.resident:.1f} GB of memory"
    figures["plans"] = sizes


def test_triton_loads_them(triton: Triton, figures: dict[str, str]) -> None:
    figures["start until ready"] = f"{triton.seconds_to_ready:.1f} s"
    figures["GPU memory, loaded"] = f"{triton.metric('nv_gpu_memory_used_bytes') / 1e9:.1f} GB"
    client = InferenceServerClient(triton.grpc)
    assert client.is_model_ready("diffusion")
    client.close()


@pytest.mark.parametrize("batch", [1, 2])
def test_every_component_computes_what_torch_computes(
    triton: Triton, checkpoint: Checkpoint, batch: int, figures: dict[str, str]
) -> None:
    width, height = (side // checkpoint.sizes["vae_scale_factor"] for side in SIZE)
    for component, tokens in calls_of(checkpoint):
        rows = 1 if component.name.startswith("vae") else batch
        inputs = example_inputs(
            component, checkpoint.sizes, batch=rows, height=height, width=width, reference_tokens=tokens
        )
        module = wrap(component, load_module(checkpoint, component)).to("cuda")
        with torch.no_grad():
            given = {name: tensor.to("cuda") for name, tensor in as_kwargs(component, inputs).items()}
            expected = module(**given)
        del module
        expected = expected if isinstance(expected, tuple) else (expected,)
        ours = infer(triton, component, [tensor.numpy() for tensor in inputs])
        pairs = zip(component.outputs, (tensor.cpu().numpy() for tensor in expected), ours, strict=True)
        worst = max(distance(tensor, theirs, mine) for tensor, theirs, mine in pairs)
        is_image = any(tensor.dtype == BYTE for tensor in component.outputs)
        named = component.name + (f" with {tokens} reference tokens" if tokens else "")
        figures[f"{named}, batch {rows}, against torch in float32"] = f"{worst:.2g} {'of 255' * is_image}"
        assert worst <= (LEVELS if is_image else ROUNDING), component.name


def calls_of(checkpoint: Checkpoint) -> Iterator[tuple[Component, int]]:
    """Each component with the reference tokens to call it with: a denoiser that takes some also without any."""
    for component in checkpoint.family.components:
        yield component, 0
        if any("reference_tokens" in tensor.axes for tensor in component.inputs):
            yield component, 1024


def infer(triton: Triton, component: Component, inputs: list[Any]) -> list[Any]:
    """The component's outputs, asked of Triton itself."""
    wanted = []
    for tensor, value in zip(component.inputs, inputs, strict=True):
        shaped = value if tensor.axes else value[:, None]  # Triton has no dimensionless input
        wanted.append(InferInput(tensor.name, list(shaped.shape), np_to_triton_dtype(shaped.dtype)))
        wanted[-1].set_data_from_numpy(np.ascontiguousarray(shaped))
    client = InferenceServerClient(triton.grpc)
    answer = client.infer(component.name, wanted, client_timeout=60)
    client.close()
    return [answer.as_numpy(tensor.name) for tensor in component.outputs]


def distance(tensor: Tensor, theirs: Any, ours: Any) -> float:
    """Root mean square, relative to the largest magnitude but for images."""
    assert theirs.shape == ours.shape
    error = float(np.sqrt(np.mean((theirs.astype(np.float64) - ours.astype(np.float64)) ** 2)))
    return error if tensor.dtype == BYTE else error / max(1.0, float(np.abs(theirs).max()))


def by_diffusers(pipeline: Any) -> Pixels:
    width, height = SIZE
    given = {name: value for name, value in FIELDS.items() if name != "seed"}
    generator = torch.Generator().manual_seed(FIELDS["seed"])
    return np.asarray(pipeline(**given, width=width, height=height, generator=generator).images[0])


async def test_an_image_is_that_of_diffusers(gateway: Server, pipeline: Any, figures: dict[str, str]) -> None:
    async with gateway.async_client() as client:
        ours = await generate(client, size=f"{SIZE[0]}x{SIZE[1]}", **FIELDS)
    differences = np.abs(ours.astype(int) - by_diffusers(pipeline).astype(int))
    figures["image against diffusers in float16"] = f"mean difference {differences.mean():.2f} of 255"
    assert differences.mean() <= IMAGE


def test_an_image_takes_no_longer_than_with_torch_compile(
    gateway: Server, pipeline: Any, figures: dict[str, str]
) -> None:
    with_triton = median_seconds(
        lambda: asyncio.run(generate_all(gateway, [{**FIELDS, "size": f"{SIZE[0]}x{SIZE[1]}"}]))
    )
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune", fullgraph=True)
    with_torch = median_seconds(lambda: by_diffusers(pipeline))
    figures[f"an image in {STEPS} steps, {SIZE[0]}x{SIZE[1]}, guidance"] = f"{with_triton * 1e3:.0f} ms"
    figures["the same by torch.compile"] = f"{with_torch * 1e3:.0f} ms, {with_torch / with_triton:.2f} times ours"
    assert with_triton <= with_torch


def median_seconds(action: Callable[[], object]) -> float:
    """After two rounds that do not count: they compile, and choose algorithms."""
    times = []
    for _ in range(2 + REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def test_images_in_flight_share_the_gpu(gateway: Server, triton: Triton, figures: dict[str, str]) -> None:
    rates = {}
    for in_flight in (1, 2, IMAGES, 2 * IMAGES):
        before, began = counts_of(triton), time.perf_counter()
        bodies = [{**FIELDS, "seed": seed, "size": f"{SIZE[0]}x{SIZE[1]}"} for seed in range(in_flight)]
        for _ in range(2):
            asyncio.run(generate_all(gateway, bodies))
        rates[in_flight] = 2 * in_flight / (time.perf_counter() - began)
        rows, calls = (now - then for now, then in zip(counts_of(triton), before, strict=True))
        figures[f"{in_flight} in flight"] = f"{rates[in_flight]:.2f} images/s, {rows / calls:.1f} rows in a UNet call"
    figures["GPU memory after that"] = f"{triton.metric('nv_gpu_memory_used_bytes') / 1e9:.1f} GB"
    assert rates[IMAGES] > rates[1]


def counts_of(triton: Triton) -> tuple[int, int]:
    """Rows and executions of the UNet since the start."""
    client = InferenceServerClient(triton.grpc)
    statistics_of = client.get_inference_statistics("unet", client_timeout=10).model_stats[0]
    client.close()
    return statistics_of.inference_count, statistics_of.execution_count


async def test_an_image_with_guidance_runs_in_cuda_graphs(
    gateway: Server, triton: Triton, figures: dict[str, str]
) -> None:
    before = triton.graphs_of("unet")
    async with gateway.async_client() as client:
        await generate(client, size=f"{SIZE[0]}x{SIZE[1]}", **FIELDS)
    by_graph, without = (now - then for now, then in zip(triton.graphs_of("unet"), before, strict=True))
    total = by_graph + without
    figures["UNet calls of one image by CUDA graph"] = f"{by_graph} of {total}"
    assert total >= STEPS
    assert without == 0
