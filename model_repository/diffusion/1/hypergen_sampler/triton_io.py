"""Conversion between Triton's requests and responses and Python values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from hypergen_sampler.bls import ComponentUnavailableError
from hypergen_sampler.request import InvalidInputError, NonFiniteError, Pixels, QueueFullError
from hypergen_sampler.stepping import ClientGoneError

TEXTS = ("prompt", "negative_prompt", "scheduler", "timestep_spacing", "sigmas", "prompt_weighting", "lora")
LISTS = ("lora", "lora_scale")
ARRAYS = ("image", "mask", "references", "reference_sizes")


@dataclass(frozen=True, kw_only=True)
class ImageOutput:
    """One response: an image or a preview of it.

    `prompt_tokens` counts the tokens of prompt and negative prompt that the text encoders read, without start, end and
    padding; `truncated_tokens` counts the tokens cut off. `timings` in seconds: queue, encoding, denoising, decoding.
    `latents` are the final ones, [C, h, w], if the request asks for them.
    """

    pixels: Pixels
    index: int
    step: int
    is_final: bool
    seed: int
    prompt_tokens: int
    truncated_tokens: int
    timings: tuple[float, float, float, float]
    latents: npt.NDArray[np.float32] | None = None


def read_inputs(request: pb_utils.InferenceRequest) -> dict[str, Any]:
    """The inputs that the client sent, by name. Images are views of Triton's memory: copy them to keep them.

    Raises:
        InvalidInputError: a text is not UTF-8, or a tensor is empty.
    """
    return {tensor.name(): _value(tensor.name(), tensor.as_numpy()) for tensor in request.inputs()}


def _value(name: str, array: npt.NDArray[Any]) -> Any:
    if name in ARRAYS:
        return array
    if name in LISTS:
        return [_single(name, value) for value in array.reshape(-1)]
    if array.size != 1:
        raise InvalidInputError(name, f"must hold one value, not {array.size}")
    return _single(name, array.reshape(-1)[0])


def _single(name: str, value: Any) -> Any:
    if name in TEXTS:
        return _text(name, value)
    # 0.7 is sent as the float32 0.699999988. The client meant the shortest decimal that rounds to this float32.
    return float(str(value)) if isinstance(value, np.float32) else value.item()


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(name, "must be UTF-8 text") from None


def response_of(output: ImageOutput) -> pb_utils.InferenceResponse:
    """The response that carries the image."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "image": output.pixels,
        "image_index": np.array([output.index], dtype=np.int32),
        "step": np.array([output.step], dtype=np.int32),
        "is_final": np.array([output.is_final]),
        "seed": np.array([output.seed], dtype=np.int64),
        "prompt_tokens": np.array([output.prompt_tokens], dtype=np.int32),
        "truncated_tokens": np.array([output.truncated_tokens], dtype=np.int32),
        "timings_ms": np.array(output.timings, dtype=np.float32) * np.float32(1000),
    }
    if output.latents is not None:
        tensors["latents"] = output.latents
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in tensors.items()])


def error_response(error: BaseException) -> pb_utils.InferenceResponse:
    """The response that ends a stream with an error; internal errors are logged, too."""
    return pb_utils.InferenceResponse(error=_triton_error(error))


def _triton_error(error: BaseException) -> pb_utils.TritonError:
    # Looked up at call time, as Triton completes its module only after this one is imported.
    codes = {
        InvalidInputError: pb_utils.TritonError.INVALID_ARG,
        QueueFullError: pb_utils.TritonError.UNAVAILABLE,
        ComponentUnavailableError: pb_utils.TritonError.UNAVAILABLE,
        ClientGoneError: pb_utils.TritonError.CANCELLED,
        NonFiniteError: pb_utils.TritonError.INTERNAL,
    }
    code = codes.get(type(error))
    if code is not None:
        return pb_utils.TritonError(str(error) or "the client has disconnected", code)
    pb_utils.Logger.log_error(f"diffusion: {type(error).__name__}: {error}")
    return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
