"""What Triton hands over and takes back: input tensors as values, pictures and errors as responses.

Knows the names of the tensors and Triton's types. What a value may be is in `contract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from hypergen_sampler.bls import ComponentUnavailableError
from hypergen_sampler.request import InvalidInputError, NonFiniteLatentsError, Pixels, QueueFullError
from hypergen_sampler.stepping import ClientGoneError

TEXTS = ("prompt", "negative_prompt", "scheduler", "lora")
ARRAYS = ("image", "mask")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One response: a picture, or what it is on its way to become.

    `prompt_tokens` counts what the text encoders read of prompt and negative prompt, without the start, end and padding
    that every text gets; `truncated_tokens` what they cut off. `timings` in seconds: waiting for a place, encoding,
    denoising, decoding.
    """

    pixels: Pixels
    index: int
    step: int
    is_final: bool
    seed: int
    prompt_tokens: int
    truncated_tokens: int
    timings: tuple[float, float, float, float]


def read_inputs(request: Any) -> dict[str, Any]:
    """The inputs that the client sent, by name. Pictures still lie in Triton's memory: copy what is to be kept.

    Raises:
        InvalidInputError: a text is not UTF-8, or a tensor is empty.
    """
    return {tensor.name(): _value(tensor.name(), tensor.as_numpy()) for tensor in request.inputs()}


def _value(name: str, array: npt.NDArray[Any]) -> Any:
    if name in ARRAYS:
        return array
    if array.size != 1:
        raise InvalidInputError(name, f"must hold one value, not {array.size}")
    value = array.reshape(-1)[0]
    if name in TEXTS:
        return _text(name, value)
    # 0.7 travels as the float32 0.699999988; what was meant is the shortest decimal that becomes this float32.
    return float(str(value)) if isinstance(value, np.float32) else value.item()


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(name, "must be UTF-8 text") from None


def response_of(picture: Picture) -> Any:
    """The response that carries the picture."""
    tensors = {
        "image": picture.pixels,
        "image_index": np.array([picture.index], dtype=np.int32),
        "step": np.array([picture.step], dtype=np.int32),
        "is_final": np.array([picture.is_final]),
        "seed": np.array([picture.seed], dtype=np.int64),
        "prompt_tokens": np.array([picture.prompt_tokens], dtype=np.int32),
        "truncated_tokens": np.array([picture.truncated_tokens], dtype=np.int32),
        "timings_ms": np.array(picture.timings, dtype=np.float32) * np.float32(1000),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in tensors.items()])


def error_response(error: BaseException) -> Any:
    """The response that ends a stream with an error; what is nobody's fault but ours is logged too."""
    return pb_utils.InferenceResponse(error=_triton_error(error))


def _triton_error(error: BaseException) -> Any:
    # Looked up here, because Triton completes its module only after this one is loaded.
    codes = {
        InvalidInputError: pb_utils.TritonError.INVALID_ARG,
        QueueFullError: pb_utils.TritonError.UNAVAILABLE,
        ComponentUnavailableError: pb_utils.TritonError.UNAVAILABLE,
        ClientGoneError: pb_utils.TritonError.CANCELLED,
        NonFiniteLatentsError: pb_utils.TritonError.INTERNAL,
    }
    code = codes.get(type(error))
    if code is not None:
        return pb_utils.TritonError(str(error) or "the client has gone", code)
    pb_utils.Logger.log_error(f"diffusion: {type(error).__name__}: {error}")
    return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
