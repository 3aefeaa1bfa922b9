"""A client of the Triton model `diffusion` that does not use the gateway."""

from __future__ import annotations

import queue
from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import triton_to_np_dtype

DATATYPES = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "scheduler": "BYTES",
    "prompt_weighting": "BYTES",
    "num_images": "INT32",
    "width": "INT32",
    "height": "INT32",
    "num_inference_steps": "INT32",
    "partial_images": "INT32",
    "guidance_scale": "FP32",
    "image_guidance_scale": "FP32",
    "guidance_start": "FP32",
    "guidance_end": "FP32",
    "cache_interval": "INT32",
    "skip_layer_guidance_scale": "FP32",
    "strength": "FP32",
    "seed": "INT64",
    "image": "UINT8",
    "mask": "UINT8",
}
Response = dict[str, npt.NDArray[Any]]


def ask(url: str, **inputs: Any) -> list[Response]:
    """The output tensors of every response, in the order in which they come.

    Raises:
        InferenceServerException: what Triton answered instead.
    """
    return list(responses(url, **inputs))


def responses(url: str, **inputs: Any) -> Generator[Response, None, None]:
    """The same one by one; closing the generator cancels the request."""
    answers: queue.Queue[Any] = queue.Queue()
    client = InferenceServerClient(url)
    try:
        client.start_stream(lambda result, error: answers.put(error or result))
        tensors = [tensor(name, value) for name, value in inputs.items()]
        client.async_stream_infer("diffusion", tensors, enable_empty_final_response=True)
        is_last = False
        while not is_last:
            answer = answers.get(timeout=60)
            if isinstance(answer, Exception):
                raise answer
            response = answer.get_response()
            is_last = response.parameters["triton_final_response"].bool_param
            yield {output.name: answer.as_numpy(output.name) for output in response.outputs}
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def tensor(name: str, value: Any) -> InferInput:
    """One input of the model, of the type that it has there."""
    datatype = DATATYPES[name]
    if isinstance(value, str):
        value = value.encode()
    array = value if isinstance(value, np.ndarray) else np.array([value], dtype=triton_to_np_dtype(datatype))
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made
