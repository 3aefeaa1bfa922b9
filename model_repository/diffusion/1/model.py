"""The Triton model `diffusion`: a prompt in, pictures out, over BLS calls to the component models.

Knows Triton's requests and responses. What a request may ask is in `contract`, the mathematics in `sampling`, the
batching in `stepping`. Every request ends its stream exactly once, whatever happens: a decoupled client waits for
ever otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton_python_backend_utils as pb_utils

from bls import Components, ComponentUnavailableError
from conditions import Array, Conditions, conditions_of, merge, outputs_of, texts_of
from contract import (
    Architecture,
    InvalidInputError,
    Limits,
    QueueFullError,
    Request,
    check_request,
    read_scheduler_config,
)
from prompts import PromptTokenizers
from sampling import Image
from stepping import ClientGoneError, StepLoop

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
TEXT_INPUTS = ("prompt", "negative_prompt", "scheduler")
# Every BLS call in flight holds a thread of asyncio's default executor, whose own size is but cores + 4.
BLS_THREADS = 64


@dataclass(frozen=True)
class _Picture:
    pixels: npt.NDArray[np.uint8]
    index: int
    steps: int
    seed: int


class TritonPythonModel:
    """Loaded once by Triton's Python backend; `execute` runs as coroutines on one event loop."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration and the files beside it. An error here keeps the model from becoming ready."""
        # The UNet has the cores; more threads for a step of the scheduler would only spin beside it.
        torch.set_num_threads(1)
        folder = Path(args["model_repository"])
        self._limits = Limits.from_model_config(args["model_config"])
        self._architecture = Architecture.from_model_config(args["model_config"])
        self._scheduler_config = read_scheduler_config(folder)
        self._tokenize = PromptTokenizers(folder, self._architecture.tokenizers)
        self._components = Components()
        self._loop: StepLoop | None = None

    async def execute(self, requests: list[Any]) -> None:
        """Serve the requests; returns when the stream of each has ended."""
        if self._loop is None:
            self._loop = self._start_loop()
        await asyncio.gather(*(self._serve(request, self._loop) for request in requests))

    def _start_loop(self) -> StepLoop:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(BLS_THREADS))
        return StepLoop(
            self._components.unet,
            max_rows=self._limits.max_batch_size,
            max_active=self._limits.max_active_images,
            max_waiting=self._limits.max_waiting_images,
        )

    async def _serve(self, triton_request: Any, loop: StepLoop) -> None:
        sender = triton_request.get_response_sender()
        try:
            request = check_request(_read_inputs(triton_request), self._limits)
            loop.reserve(request.num_images)
            try:
                await self._draw(request, sender, loop)
            finally:
                loop.release(request.num_images)
        except BaseException as error:
            sender.send(pb_utils.InferenceResponse(error=_triton_error(error)), flags=FINAL)
            if not isinstance(error, Exception):
                raise

    async def _draw(self, request: Request, sender: Any, loop: StepLoop) -> None:
        """Send each picture as soon as it is ready; the last one sent ends the stream."""
        texts = await self._encode(texts_of(request, self._architecture))
        conditions = conditions_of(request, texts, self._architecture)
        # One bound method for all images of the request: the step loop then asks Triton once for all of them.
        cancelled = sender.is_cancelled
        tasks = [
            asyncio.create_task(self._draw_one(request, index, conditions, cancelled, loop))
            for index in range(request.num_images)
        ]
        try:
            for number, finished in enumerate(asyncio.as_completed(tasks), start=1):
                response = _response(await finished)
                sender.send(response, flags=FINAL if number == len(tasks) else 0)
        finally:
            for task in tasks:
                task.cancel()

    async def _encode(self, texts: list[str]) -> dict[str, Array]:
        """What the text encoders make of the texts together: hidden states [T, L, D] and, of some, a pooled [T, P]."""
        made_of = self._architecture
        calls = zip(made_of.text_encoders, self._tokenize(texts), outputs_of(made_of), strict=True)
        return merge(await asyncio.gather(*(self._components.encode_text(*call) for call in calls)))

    async def _draw_one(
        self, request: Request, index: int, conditions: Conditions, cancelled: Callable[[], bool], loop: StepLoop
    ) -> _Picture:
        own = replace(request, seed=request.seed + index)
        image = Image(own, conditions, self._latent_shape(own), self._scheduler_config)
        latents = await loop.sample(image, cancelled)
        pixels = await self._components.decode(latents)
        return _Picture(pixels, index, image.steps_done, own.seed)

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        factor = self._limits.vae_scale_factor
        return self._limits.latent_channels, request.height // factor, request.width // factor


def _read_inputs(request: Any) -> dict[str, Any]:
    """The inputs that the client sent, by name.

    Raises:
        InvalidInputError: a text is not UTF-8, or a tensor is empty.
    """
    given: dict[str, Any] = {}
    for tensor in request.inputs():
        values = tensor.as_numpy().reshape(-1)
        if values.size != 1:
            raise InvalidInputError(tensor.name(), f"must hold one value, not {values.size}")
        given[tensor.name()] = _text(tensor.name(), values[0]) if tensor.name() in TEXT_INPUTS else values[0].item()
    return given


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(name, "must be UTF-8 text") from None


def _response(picture: _Picture) -> Any:
    tensors = {
        "image": picture.pixels,
        "image_index": np.array([picture.index], dtype=np.int32),
        "step": np.array([picture.steps], dtype=np.int32),
        "is_final": np.array([True]),
        "seed": np.array([picture.seed], dtype=np.int64),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in tensors.items()])


def _triton_error(error: BaseException) -> Any:
    # Looked up here, because Triton completes its module only after this one is loaded.
    codes = {
        InvalidInputError: pb_utils.TritonError.INVALID_ARG,
        QueueFullError: pb_utils.TritonError.UNAVAILABLE,
        ComponentUnavailableError: pb_utils.TritonError.UNAVAILABLE,
        ClientGoneError: pb_utils.TritonError.CANCELLED,
    }
    code = codes.get(type(error))
    if code is not None:
        return pb_utils.TritonError(str(error) or "the client has gone", code)
    pb_utils.Logger.log_error(f"diffusion: {type(error).__name__}: {error}")
    return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
