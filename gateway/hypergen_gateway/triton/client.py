"""Image generation backend on a Triton server, over gRPC.

Maps requests to tensors, and gRPC errors to API errors in one place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import struct
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, nullcontext, suppress
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferResult
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import triton_to_np_dtype

from hypergen_gateway.errors import (
    DeadlineExceededError,
    HyperGenError,
    InternalError,
    InvalidRequestError,
    NonFiniteImageError,
    QueueFullError,
    UnavailableError,
)
from hypergen_gateway.generation.backend import (
    GeneratedImage,
    GenerationRequest,
    Lora,
    ModelDescription,
    Names,
    Quality,
    Timings,
)
from hypergen_gateway.http.request_id import current_request_id, current_trace

logger = logging.getLogger(__name__)

SAMPLER = "diffusion"

CHANNEL_ARGS: list[tuple[str, int | str]] = [
    # If the address resolves to several Tritons, streams go to each available one in turn.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    # gRPC stops at 4 MB; an image of 2048 × 2048 pixels has 12.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A Triton that restarts is found again within a second rather than two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Triton closes a connection that pings more often than every 300 s.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own retries would repeat requests that a model rejected, and a resolver could enable them.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # http_proxy in the environment does not apply to Triton.
    ("grpc.enable_http_proxy", 0),
]

_DATATYPES = {
    "str": "BYTES",
    "int": "INT32",
    "Int64": "INT64",
    "float": "FP32",
    "Pixels": "UINT8",
    "Sides": "INT32",
    "Names": "BYTES",
    "Scales": "FP32",
    "bool": "BOOL",
}
# Input tensors of `diffusion`: the fields of `GenerationRequest`. Absent fields are not sent.
INPUT_TYPES: dict[str, str] = {
    field.name: _DATATYPES[str(field.type).removesuffix(" | None")] for field in dataclasses.fields(GenerationRequest)
}

# A BYTES tensor has the length of each text before it.
_LENGTH = struct.Struct("<I")

OUTPUTS = (
    *("image", "image_index", "step", "is_final", "seed", "prompt_tokens", "truncated_tokens", "timings_ms"),
    "latents",
)
# The first is missing from samplers of earlier releases, which a gateway may use during a rolling update; the second
# comes only if it is requested.
_OPTIONAL_OUTPUTS = {"truncated_tokens", "latents"}

# Request fields of inputs with a different name.
_PARAMS: Mapping[str, str] = {
    "num_images": "n",
    "width": "size",
    "height": "size",
    "lora": "lora_path",
    "references": "image",
    "reference_sizes": "image",
}

# Long enough for gRPC to notice a lost Triton and stop using it.
RETRY_SECONDS = 0.2


def to_lora(entry: Mapping[str, Any]) -> Lora:
    """A LoRA as the exporter describes it. Raises KeyError, TypeError."""
    return Lora(
        name=entry["name"],
        scale=entry["scale"],
        is_merged="models" in entry,
        columns=len(entry.get("columns", ())),
        changes=tuple(entry.get("changes", ())),
    )


# Parsers of parameters in config.pbtxt, which are strings, by type of the field of `ModelDescription`.
_PARSERS: dict[str, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "float": float,
    "tuple[str, ...]": lambda text: tuple(name for name in text.split(",") if name),
    "Lines": lambda text: tuple(text.splitlines()),
    "tuple[Lora, ...]": lambda text: tuple(map(to_lora, json.loads(text))),
    "tuple[Quality, ...]": lambda text: tuple(Quality(**entry) for entry in json.loads(text)),
}


class TritonBackend:
    """Generates images on the Triton server at `url` (HOST:PORT of its gRPC service). Belongs to one event loop.

    `url` may name several servers of the same model: `dns:///HOST:PORT`, or `ipv4:ADDRESS:PORT,ADDRESS:PORT`.

    `loras` are those that are served instead of the ones in the sampler's parameters, once they have changed. Within
    `hold_loras` the LoRAs of a request are in the rank pool and stay there.

    `request_timeout` limits a whole generation, `call_timeout` every other call, in seconds. After a lost connection,
    requests are retried for `retry_seconds`, until Triton or another replica is available.
    """

    def __init__(
        self,
        url: str,
        *,
        request_timeout: float = 600.0,
        call_timeout: float = 2.0,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._url = url
        self._request_timeout = request_timeout
        self._call_timeout = call_timeout
        self._retry_seconds = retry_seconds
        self._open_service: _Service | None = None
        self._description: ModelDescription | None = None
        self._description_is_fresh = False
        self._streams = 0
        self.loras: tuple[Lora, ...] | None = None
        self.rejected_loras: Mapping[str, str] = {}
        self.hold_loras: Callable[[Names], AbstractAsyncContextManager[None]] = lambda _: nullcontext()
        self._draining = set[asyncio.Future[None]]()

    @property
    def at_work(self) -> bool:
        """Whether requests are running."""
        return self._streams > 0

    async def describe(self) -> ModelDescription:
        """The parameters of the sampler, read again after a lost connection, as the model may have changed."""
        if self._description is None or not self._description_is_fresh:
            try:
                self._description = await self._read_description()
                self._description_is_fresh = True
            except HyperGenError:
                if self._description is None:
                    raise
        if self.loras is None:
            return self._description
        return dataclasses.replace(self._description, loras=self.loras)

    async def ready(self) -> bool:
        """Whether the server and all models that an image needs are ready."""
        triton, limit = self._service.triton, self._call_timeout
        try:
            models = (SAMPLER, *(await self.describe()).components)
            with self._translate_errors():
                probes = [triton.ModelReady(pb.ModelReadyRequest(name=name), timeout=limit) for name in models]
                answers = await asyncio.gather(triton.ServerReady(pb.ServerReadyRequest(), timeout=limit), *probes)
        except HyperGenError:
            return False
        return all(answer.ready for answer in answers)

    async def generate(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        """Yield images in the order in which they are finished, each after its previews.

        If Triton is lost, the request is sent again, as the same seeds give the same images, and images that were
        already yielded are skipped. The number of retries is limited, as the request may have caused the loss.
        """
        async with self.hold_loras(generation.lora), aclosing(self._retried(generation)) as images:
            async for image in images:
                yield image

    async def _retried(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        received: set[tuple[int, int]] = set()
        retry = _RetryPolicy(self._retry_seconds)
        while True:
            try:
                retry.begin()
                async with aclosing(self._stream(generation)) as images:
                    async for image in images:
                        if (image.index, image.step) not in received:
                            received.add((image.index, image.step))
                            yield image
                return
            except UnavailableError as error:
                if self._open_service is None or not retry.should_retry():  # None: this backend was closed
                    raise
                if retry.is_first:
                    logger.warning("request %s: sending it to Triton again (%s)", current_request_id.get(), error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _stream(self, generation: GenerationRequest) -> AsyncGenerator[GeneratedImage, None]:
        """One stream per request, as Triton closes a stream to report an error with its code."""
        # Without the first, errors are text in the stream, without their code. The others are for Triton's traces.
        headers = (("triton_grpc_error", "true"), *current_trace.get().items())
        call = self._service.infer(_to_request(generation), timeout=self._request_timeout, metadata=headers)
        self._streams += 1
        missing = generation.num_images
        try:
            with self._translate_errors():
                async for response in call:
                    image = _to_image(response)
                    missing -= image.is_final
                    yield image
                    if not missing:
                        return
        finally:
            self._streams -= 1
            if missing:
                call.cancel()
            else:  # all images are received: do not wait a round trip for the end of the stream
                self._draining.add(draining := asyncio.ensure_future(_drain(call)))
                draining.add_done_callback(self._draining.discard)

    async def close(self) -> None:
        """Close the connection."""
        for draining in self._draining:
            draining.cancel()
        if self._open_service is not None:
            await self._open_service.channel.close(None)
            self._open_service = None

    @property
    def _service(self) -> _Service:
        # Created once, as each channel leaks some memory, and lazily, as it binds to the running event loop.
        if self._open_service is None:
            self._open_service = _Service(self._url)
        return self._open_service

    async def _read_description(self) -> ModelDescription:
        try:
            with self._translate_errors():
                request = pb.ModelConfigRequest(name=SAMPLER)
                response = await self._service.triton.ModelConfig(request, timeout=self._call_timeout)
        except DeadlineExceededError as error:  # a hanging Triton is unavailable; no image was late
            message = "The image model is not responding. Try again later."
            raise UnavailableError(message, detail=f"no response within {self._call_timeout:g} s") from error
        return to_description({name: value.string_value for name, value in response.config.parameters.items()})

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate gRPC errors into API errors."""
        try:
            yield
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            api_error = _translate(error)
            if isinstance(api_error, UnavailableError | DeadlineExceededError):
                self._description_is_fresh = False
            raise api_error from error


class _Service:
    """Triton's gRPC service over one connection."""

    def __init__(self, url: str) -> None:
        self.channel = grpc.aio.insecure_channel(url, options=CHANNEL_ARGS)
        self.triton = GRPCInferenceServiceStub(self.channel)
        # Triton accepts any number of requests per stream. A unary request is equivalent to a stream of one, and gRPC
        # sends it together with its headers and end.
        self.infer = self.channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )


class _RetryPolicy:
    """Decides whether to retry: until Triton should be available again, and after at most two interrupted attempts."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures = self._interruptions = 0
        self._began = self._ends = 0.0

    @property
    def is_first(self) -> bool:
        """Whether there has been exactly one failure."""
        return self._failures == 1

    def begin(self) -> None:
        """Start an attempt."""
        self._began = time.monotonic()

    def should_retry(self) -> bool:
        """Record a failure, and decide whether to retry."""
        now = time.monotonic()
        if not self._failures:
            self._ends = now + self._seconds
        self._failures += 1
        # An immediate failure means that Triton was unavailable; a later one interrupted the generation.
        self._interruptions += now - self._began > RETRY_SECONDS
        return self._interruptions < 3 and now < self._ends


async def _drain(call: Any) -> None:
    with suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
        async for _ in call:
            pass


def _to_request(generation: GenerationRequest) -> Any:
    request = pb.ModelInferRequest(model_name=SAMPLER, id=current_request_id.get())
    for name, datatype in INPUT_TYPES.items():
        value = getattr(generation, name)
        if value is not None and not (isinstance(value, tuple) and not value):
            shape, content = _to_tensor(datatype, value)
            request.inputs.add(name=name, datatype=datatype, shape=shape)
            request.raw_input_contents.append(content)
    return request


def _to_tensor(datatype: str, value: Any) -> tuple[tuple[int, ...], bytes]:
    """Shape and content of a tensor for an image, a single value or several."""
    values = value if isinstance(value, tuple) else (value,)
    if isinstance(values[0], str):
        texts = [text.encode() for text in values]
        return (len(texts),), b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    array = value if isinstance(value, np.ndarray) else np.array(values, dtype=triton_to_np_dtype(datatype))
    return array.shape, array.tobytes()


def _to_image(response: Any) -> GeneratedImage:
    if response.error_message:
        raise InternalError(f"Triton reported an error in the stream: {response.error_message}")
    result = InferResult(response.infer_response)
    tensors = {name: result.as_numpy(name) for name in OUTPUTS}
    missing = [name for name, tensor in tensors.items() if tensor is None and name not in _OPTIONAL_OUTPUTS]
    if missing:
        raise InternalError(f"the model {SAMPLER!r} sent a response without {', '.join(missing)}")
    truncated = tensors["truncated_tokens"]
    queue, encode_text, denoise, decode = (float(milliseconds) for milliseconds in tensors["timings_ms"])
    return GeneratedImage(
        pixels=tensors["image"],
        index=int(tensors["image_index"][0]),
        seed=int(tensors["seed"][0]),
        step=int(tensors["step"][0]),
        is_final=bool(tensors["is_final"][0]),
        prompt_tokens=int(tensors["prompt_tokens"][0]),
        truncated_tokens=0 if truncated is None else int(truncated[0]),
        timings=Timings(queue=queue, encode_text=encode_text, denoise=denoise, decode=decode),
        latents=tensors["latents"],
    )


def to_description(parameters: Mapping[str, str]) -> ModelDescription:
    """The description that a sampler's parameters give. Raises InternalError."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ModelDescription):
        try:
            values[field.name] = _PARSERS[str(field.type)](parameters[field.name])
        except (KeyError, TypeError, ValueError) as error:
            given = parameters.get(field.name)
            detail = f"parameter {field.name!r} of the model {SAMPLER!r} is {given!r}; export the model again"
            raise InternalError(detail) from error
    return ModelDescription(**values)


def _translate(error: Exception) -> HyperGenError:
    code, message = _code_and_message(error)
    if code == "INVALID_ARGUMENT":
        return _invalid_argument(message)
    if code == "UNAVAILABLE" and message.startswith("queue full"):
        return QueueFullError("Too many requests are waiting. Try again later.")
    if code == "INTERNAL" and message.startswith("not finite"):
        return NonFiniteImageError()
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceededError("Triton did not respond in time.")
    # NOT_FOUND: the model is not loaded, or was unloaded. CANCELLED: Triton is shutting down, as this backend did not
    # cancel. "is not healthy": the sampler's process died or hangs.
    if code in {"UNAVAILABLE", "NOT_FOUND", "CANCELLED"} or "is not healthy" in message:
        public = "The image model is not available at the moment. Try again later."
        return UnavailableError(public, retry_after=2.0, detail=message)
    return InternalError(f"Triton responded with {code}: {message}")


def _code_and_message(error: Exception) -> tuple[str, str]:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code().name, error.details() or ""
    return "UNAVAILABLE", str(error)  # the channel was closed at shutdown


def _invalid_argument(message: str) -> HyperGenError:
    """The sampler's messages start with the input; others are Triton's, about a malformed request by the gateway."""
    match = re.match(r"(\w+): (.*)", message, re.DOTALL)
    if match is None or match[1] not in INPUT_TYPES:
        return InternalError(f"Triton rejected the gateway's request: {message}")
    param = _PARAMS.get(match[1], match[1])
    return InvalidRequestError(f"Invalid value for '{param}': {match[2]}", param)
