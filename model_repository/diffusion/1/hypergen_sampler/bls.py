"""Calls to the component models through Triton's business logic scripting (BLS), with numpy arrays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from hypergen_sampler.conditioning import Array
from hypergen_sampler.prompts import EncoderInputs
from hypergen_sampler.request import Architecture, NonFiniteError
from hypergen_sampler.sampling import DenoiserInputs

# Parts of Triton's error messages, as BLS has no error codes before 25.05.
UNAVAILABLE = ("Server not ready", "is not healthy", "is not ready")

# The decoder of previews, in repositories that have one.
PREVIEW_DECODER = "preview_decoder"


class ComponentError(RuntimeError):
    """A component model returned an error."""


class ComponentUnavailableError(ComponentError):
    """Triton is shutting down or has lost the component's process; the request may succeed later."""


class Components:
    """The engines of a checkpoint and its LoRAs, which take at most `max_rows` texts in a call."""

    def __init__(self, architecture: Architecture, max_rows: int) -> None:
        self._architecture = architecture
        self._max_rows = max_rows

    async def encode_text(self, encoder: str, inputs: EncoderInputs, outputs: Sequence[str]) -> dict[str, Array]:
        """Encode tokenized texts [B, L]; returns the text encoder's named outputs, such as hidden states [B, L, D]."""
        texts = len(next(iter(inputs.values())))
        calls = [
            _call(encoder, {name: array[first : first + self._max_rows] for name, array in inputs.items()}, outputs)
            for first in range(0, texts, self._max_rows)
        ]
        answers = await asyncio.gather(*calls)
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}

    def denoise(self, rows: DenoiserInputs) -> dict[str, Array]:
        """Run the denoiser on a batch; returns the requested outputs, each [R, C, h, w]. Blocks the calling thread."""
        inputs = {"sample": rows.sample, "time": self._architecture.embed_timesteps(rows.timestep), **rows.conditions}
        return _outputs(rows.model, _request(rows.model, inputs, rows.outputs).exec(), rows.outputs)

    async def encode(
        self, image: npt.NDArray[np.uint8], kept: npt.NDArray[np.uint8] | None = None
    ) -> tuple[Array, Array]:
        """Encode an image [H, W, 3]; returns the mean and standard deviation [C, h, w] of its latents.

        `kept` [H, W] is an input of the encoders of inpainting models: where it is 0, the image is blank.
        """
        inputs = {"image": image[None], **({} if kept is None else {"kept": kept[None, :, :, None]})}
        answer = await _call("vae_encoder", inputs, ["mean", "std"])
        return answer["mean"][0], answer["std"][0]

    async def decode(self, latents: Array, *, is_preview: bool = False) -> npt.NDArray[np.uint8]:
        """Decode latents [C, h, w] to an image [H, W, 3].

        Raises:
            NonFiniteError: pixels are infinite or NaN, which in bytes would be black or white.
        """
        model = PREVIEW_DECODER if is_preview and PREVIEW_DECODER in self._architecture.components else "vae_decoder"
        answer = await _call(model, {"latents": latents[None]}, ["image", "pixel_mean"])
        if not np.isfinite(answer["pixel_mean"]).all():
            raise NonFiniteError("not finite: the image that the VAE decoded")
        image: npt.NDArray[np.uint8] = answer["image"][0]
        return image


async def _call(
    model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    return _outputs(model, await _request(model, inputs, outputs).async_exec(), outputs)


def _request(model: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> pb_utils.InferenceRequest:
    return pb_utils.InferenceRequest(
        model_name=model,
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
        requested_output_names=list(outputs),
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
    )


def _outputs(model: str, response: pb_utils.InferenceResponse, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    if response.has_error():
        message = response.error().message()
        unavailable = any(words in message for words in UNAVAILABLE)
        raise (ComponentUnavailableError if unavailable else ComponentError)(f"{model}: {message}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}
