"""How close the UNet comes to the processor's peak: its rate against that of one large matrix product.

In float32, too, which is what a peer in float32 can reach at best, and so bounds what bfloat16 can win over it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import openvino
import torch
from openvino import opset13 as ops
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environments import ToolError
from benchmarks.figures import Figures
from benchmarks.measures.turns import Bench
from benchmarks.peers import OURS
from benchmarks.workloads import Workload, repository
from hypergen_gateway.embedded.backends.openvino.compilations import read_model

PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}
# Side of a square matrix: 16 MB in bfloat16, large enough for the product's highest rate.
WIDTH = 2880
ROUNDS = 9
Arrays = dict[str, npt.NDArray[np.float32]]


async def hardware(bench: Bench, workload: Workload) -> None:
    """GFLOP/s of a matrix product in both precisions and of the UNet in the server's, in alternation."""
    name = f"hardware_{workload.name}"
    try:
        async with bench.running(OURS, workload):  # exports the checkpoint on first use
            pass
        bench.enter(await asyncio.to_thread(_rates, name, bench.environment.dtype, workload, bench))
    except ToolError as error:
        bench.fail(name, error)


def _rates(name: str, dtype: str, workload: Workload, bench: Bench) -> Figures:
    inputs, gflop = _guided_step(workload)
    file = repository(workload, dtype, bench.environment.work) / "unet" / "1" / "model.onnx"
    unet = _compile(read_model(openvino.Core(), file), inputs, PRECISIONS[dtype])
    products = [_compile(*_product(), hint) for hint in PRECISIONS.values()]
    seconds = _in_turns([unet, *products])
    product_gflop = 2 * WIDTH**3 / 1e9
    rates = [gflop / seconds[0], *(product_gflop / each for each in seconds[1:])]
    peaks = dict(zip(PRECISIONS, rates[1:], strict=True))
    return {
        f"{name}_unet_share_of_matrix_product": round(rates[0] / peaks[dtype], 3),
        f"{name}_unet_gflop": round(gflop, 2),
        f"{name}_unet_gflop_per_second": round(rates[0], 1),
        **{f"{name}_matrix_product_{kind}_gflop_per_second": round(rate, 1) for kind, rate in peaks.items()},
    }


def _guided_step(workload: Workload) -> tuple[Arrays, float]:
    """The UNet's inputs for an image with guidance, and the cost of a call in GFLOP."""
    config = json.loads((workload.checkpoint / "unet" / "config.json").read_text())
    tokens = json.loads((workload.checkpoint / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    sample = (2, config["in_channels"], workload.request.height // 8, workload.request.width // 8)
    states = (2, tokens, config["cross_attention_dim"])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        diffusers.UNet2DConditionModel.from_config(config)(torch.ones(sample), torch.ones(2), torch.ones(states))
    shapes = {"sample": sample, "time": (2, config["block_out_channels"][0]), "encoder_hidden_states": states}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, counter.get_total_flops() / 1e9


def _product() -> tuple[Any, Arrays]:
    left = ops.parameter([WIDTH, WIDTH], np.float32, name="left")
    left.output(0).set_names({"left"})
    right = ops.constant(np.ones((WIDTH, WIDTH), np.float32))
    product = ops.matmul(left, right, transpose_a=False, transpose_b=True)
    return openvino.Model([product], [left], "product"), {"left": np.ones((WIDTH, WIDTH), np.float32)}


def _compile(model: Any, inputs: Arrays, precision: str) -> Callable[[], Any]:
    model.reshape({name: list(array.shape) for name, array in inputs.items()})
    properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": precision}
    request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True)


def _in_turns(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each. The first round warms up."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for call, seconds in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in taken]
