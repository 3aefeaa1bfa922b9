"""A fake Triton server in this process: the part of its gRPC service that the gateway uses, with injectable faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype

PARAMETERS = {
    "model_id": "acme/tiny-emoji",
    "export_key": "k1",
    "engine": "openvino",
    "dtype": "bfloat16",
    "device": "cuda:0",
    "components": "text_encoder,unet,vae_decoder",
    "schedulers": "ddim,euler",
    "default_width": "64",
    "default_height": "48",
    "size_factor": "8",
    "min_size": "32",
    "max_size": "512",
    "sizes": "",
    "loras": '[{"name": "ink", "scale": 0.5, "models": {"unet": "unet.ink@0.5"}}]',
    "default_num_inference_steps": "20",
    "default_guidance_scale": "5.5",
    "default_scheduler": "euler",
    "max_prompt_tokens": "75",
    "max_num_images": "10",
    "max_num_inference_steps": "150",
    "min_guidance_scale": "1",
    "max_guidance_scale": "20",
    "guidance": "classifier_free",
    "default_image_guidance_scale": "0",
    "max_image_guidance_scale": "0",
    "max_cache_interval": "10",
    "prompt_weightings": "none,a1111",
    "default_prompt_weighting": "none",
    "embeddings": "",
    "max_clip_skip": "12",
    "default_clip_skip": "0",
    "max_skip_layer_guidance_scale": "10",
    "default_skip_layer_guidance_scale": "0",
    "max_active_images": "32",
    "max_waiting_images": "256",
    "max_references": "4",
    "masked_image_yields": "0",
    "max_reference_pixels": "1048576",
    "max_reference_side": "4096",
    "preferred_reference_sizes": "672x1568,1024x1024",
    "base_model": "Stable Diffusion 1.x",
    "suggestions": "a rocket, red\na cat",
    "passport": "[]",
}


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Its attributes say how it behaves and what it saw."""

    def __init__(self) -> None:
        self.parameters = dict(PARAMETERS)
        self.server_is_ready = True
        self.unready_models: set[str] = set()
        self.hangs = False
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.in_band_error: str | None = None
        self.left_out_outputs: set[str] = set()
        self.images_before_trouble: int | None = None  # None: no limit
        self.trouble_follows_previews = False
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled_streams = 0

    async def ServerReady(self, _: Any, context: Any) -> Any:  # noqa: N802
        await self._trouble(context)
        return pb.ServerReadyResponse(ready=self.server_is_ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._trouble(context)
        return pb.ModelReadyResponse(ready=request.name not in self.unready_models)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._trouble(context)
        response = pb.ModelConfigResponse()
        response.config.name = request.name
        for name, value in self.parameters.items():
            response.config.parameters[name].string_value = value
        return response

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.headers.append({str(key): str(value) for key, value in context.invocation_metadata()})
        try:
            async for request in requests:
                self.requests.append(request)
                async for response in self._images(tensors_of(request), context):
                    yield response
        except asyncio.CancelledError:
            self.cancelled_streams += 1
            raise

    async def _images(self, tensors: dict[str, Any], context: Any) -> AsyncIterator[Any]:
        for index in range(tensors["num_images"]):
            is_trouble_near = self.images_before_trouble in (None, index)
            if is_trouble_near and not self.trouble_follows_previews:
                await self._trouble(context)
            if self.in_band_error is not None:
                yield pb.ModelStreamInferResponse(error_message=self.in_band_error)
                return
            for step in range(1, tensors["partial_images"] + 1):
                yield self._image(tensors, index, step, is_final=False)
            if is_trouble_near and self.trouble_follows_previews:
                await self._trouble(context)
            yield self._image(tensors, index, tensors["num_inference_steps"], is_final=True)

    async def _trouble(self, context: Any) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            await context.abort(*self.failure)

    def _image(self, tensors: dict[str, Any], index: int, step: int, is_final: bool) -> Any:
        seed = tensors["seed"] + index
        outputs: dict[str, np.ndarray[Any, Any]] = {
            "image": np.full((tensors["height"], tensors["width"], 3), seed % 256, dtype=np.uint8),
            "image_index": np.array([index], dtype=np.int32),
            "step": np.array([step], dtype=np.int32),
            "is_final": np.array([is_final]),
            "seed": np.array([seed], dtype=np.int64),
            "prompt_tokens": np.array([len(tensors["prompt"].split())], dtype=np.int32),
            "truncated_tokens": np.array([3], dtype=np.int32),
            "timings_ms": np.array([1, 2, 30, 4], dtype=np.float32),
        }
        response = pb.ModelStreamInferResponse()
        for name, array in outputs.items():
            if name not in self.left_out_outputs:
                response.infer_response.outputs.add(
                    name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape
                )
                response.infer_response.raw_output_contents.append(array.tobytes())
        return response


_NUMBERS = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "UINT8": np.uint8}


def tensors_of(request: Any) -> dict[str, Any]:
    """What each input of a request holds, decoded by the datatype that it declares: an image, or its values."""
    values: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            held = [text.decode() for text in deserialize_bytes_tensor(raw)]
        else:
            array = np.frombuffer(raw, _NUMBERS[tensor.datatype]).reshape(tensor.shape)
            if array.ndim > 1:
                values[tensor.name] = array
                continue
            held = array.tolist()
        values[tensor.name] = tuple(held) if tensor.name in ("lora", "lora_scale") else held[0]
    return values


@asynccontextmanager
async def serving(triton: FakeTriton, port: int = 0) -> AsyncIterator[str]:
    """The fake on a port of 127.0.0.1; gives HOST:PORT. At the end, running calls are cut off."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)
