"""The Triton model `diffusion`: generates images from a prompt through BLS calls to the component models.

This module defines the order of a request's phases; validation is in `request`, tensors in `triton_io`, the mathematics
in `sampling`, the batching in `stepping`. Every request ends its stream exactly once, even after an error, as clients
of a decoupled model would otherwise wait forever.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from hypergen_sampler.bls import Components
from hypergen_sampler.composite import composite
from hypergen_sampler.conditioning import Array, Conditioning, conditioning_of, merge, texts_of, with_lora_scales
from hypergen_sampler.latent_init import ImagePosterior, LatentInit, masked_image_of, references_of
from hypergen_sampler.lora import LoraTable
from hypergen_sampler.metrics import SamplerMetrics
from hypergen_sampler.prompts import PromptTokenizers, Tokens
from hypergen_sampler.request import Architecture, Limits, NonFiniteError, Request, check_request
from hypergen_sampler.sampling import Trajectory
from hypergen_sampler.schedulers import Schedulers
from hypergen_sampler.stepping import LatentsOutput, StepLoop
from hypergen_sampler.text_cache import TextCache
from hypergen_sampler.triton_io import ImageOutput, error_response, read_inputs, response_of

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# Every BLS call in flight, except the denoiser's, occupies a thread of asyncio's default executor, which by default has
# only cores + 4.
BLS_THREADS = 64
# About three hundred prompts of Stable Diffusion 1.5, or a hundred of SDXL.
TEXT_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class _PreparedRequest:
    """The state shared by the images of one request."""

    request: Request
    conditions: Conditioning
    latent_init: LatentInit
    prompt_tokens: int
    truncated_tokens: int
    encode_seconds: float
    sender: pb_utils.InferenceResponseSender
    cancelled: Callable[[], bool]
    """One bound method for all images, so that the step loop polls Triton once for all."""


class TritonPythonModel:
    """The model, loaded once by Triton's Python backend; calls of `execute` are coroutines on one event loop."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration and the files beside it. An error here keeps the model from becoming ready."""
        # Leave the cores to the denoiser: more threads for a scheduler's step would only spin.
        torch.set_num_threads(1)
        folder = Path(args["model_repository"])
        self._limits = Limits.from_model_config(args["model_config"])
        self._architecture = Architecture.from_model_config(args["model_config"])
        self._schedulers = Schedulers.read(folder, self._architecture)
        self._tokenize = PromptTokenizers(folder, self._architecture.text_inputs)
        self._components = Components(self._architecture, self._limits.max_batch_size)
        self._loras = LoraTable(folder, self._limits.loras)
        self._encode_text = TextCache(self._components.encode_text, TEXT_CACHE_BYTES)
        self._metrics = SamplerMetrics(self._limits.max_batch_size)
        self._loop: StepLoop | None = None

    async def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Serve the requests; returns when the stream of each has ended."""
        if self._loop is None:
            self._loop = self._start_loop()
        await asyncio.gather(*(self._serve(request, self._loop) for request in requests))

    def finalize(self) -> None:
        """Free what is Triton's: the process would crash at its end, when Triton's memory is gone."""
        self._metrics.close()
        gc.collect()  # the senders of cancelled requests are in circles of references

    def _start_loop(self) -> StepLoop:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(BLS_THREADS))
        return StepLoop(
            self._components.denoise,
            max_rows=self._limits.max_batch_size,
            max_active=self._limits.max_active_images,
            max_waiting=self._limits.max_waiting_images,
            report=self._metrics.report,
        )

    async def _serve(self, triton_request: pb_utils.InferenceRequest, loop: StepLoop) -> None:
        sender = triton_request.get_response_sender()
        try:
            request = check_request(read_inputs(triton_request), self._current_limits())
            self._architecture.check(request)
            loop.reserve(request.num_images)
            try:
                await self._generate(await self._prepare(request, sender), loop)
            finally:
                loop.release(request.num_images)
        except BaseException as error:
            sender.send(error_response(error), flags=FINAL)
            if not isinstance(error, Exception):
                raise

    def _current_limits(self) -> Limits:
        """The limits with the LoRAs that are served now."""
        loras, have_changed = self._loras.read()
        if have_changed:
            # A column of the rank pool may hold another LoRA than before.
            self._encode_text.clear()
            self._limits = replace(self._limits, loras=loras)
        return self._limits

    async def _prepare(self, request: Request, sender: pb_utils.InferenceResponseSender) -> _PreparedRequest:
        began = time.perf_counter()
        request = _with_copied_pixels(request)
        tokens = self._tokenize(texts_of(request, self._architecture), request.prompt_weighting, request.clip_skip)
        texts, encoded, masked_image, references = await asyncio.gather(
            self._encode_texts(request, tokens),
            self._encode_image(request),
            self._encode_masked_image(request),
            self._encode_references(request),
        )
        is_edited = self._architecture.edits_by_instruction
        edited, original = (encoded, None) if is_edited else (None, encoded)
        seen = references_of(request, original, references, self._architecture)
        return _PreparedRequest(
            request=request,
            conditions=conditioning_of(request, texts, self._architecture, seen, edited.mean if edited else None),
            latent_init=LatentInit(
                shape=self._latent_shape(request),
                original=original,
                mask=request.mask,
                masked_image=masked_image,
                respaces_timesteps=self._architecture.is_latent_consistency,
                is_flow=bool(self._architecture.is_flow),
                starts_from_mode=bool(self._architecture.encodes_mode),
                interpolates_mask=self._architecture.latent_patch_size > 1,
            ),
            prompt_tokens=tokens.count,
            truncated_tokens=tokens.cut,
            encode_seconds=time.perf_counter() - began,
            sender=sender,
            cancelled=sender.is_cancelled,
        )

    async def _encode_texts(self, request: Request, tokens: Tokens) -> Conditioning:
        """The encoded texts: hidden states [T, L, D] and, for some families, pooled embeddings [T, P] or a mask."""
        text_inputs = self._architecture.text_inputs
        calls = [
            self._encode_text(request.loras.model(text.encoder), with_lora_scales(given, text, request), text.outputs)
            for text, given in zip(text_inputs, tokens.inputs, strict=True)
        ]
        return merge(await asyncio.gather(*calls), tokens, self._architecture)

    async def _encode_image(self, request: Request) -> ImagePosterior | None:
        if request.image is None:
            return None
        kept = np.ones(request.image.shape[:2], np.uint8) if self._architecture.takes_masked_image else None
        return ImagePosterior(*await self._components.encode(request.image, kept))

    async def _encode_masked_image(self, request: Request) -> ImagePosterior | None:
        if not self._architecture.takes_masked_image:
            return None
        return ImagePosterior(*await self._components.encode(*masked_image_of(request)))

    async def _encode_references(self, request: Request) -> list[Array]:
        posteriors = await asyncio.gather(*(self._components.encode(image) for image in request.references))
        return [mean for mean, _ in posteriors]

    async def _generate(self, job: _PreparedRequest, loop: StepLoop) -> None:
        """Send each image as soon as it is ready; the last one sent ends the stream."""
        tasks = [asyncio.create_task(self._generate_image(job, index, loop)) for index in range(job.request.num_images)]
        try:
            for number, finished in enumerate(asyncio.as_completed(tasks), start=1):
                response = response_of(await finished)
                job.sender.send(response, flags=FINAL if number == len(tasks) else 0)
        finally:
            for task in tasks:
                task.cancel()

    async def _generate_image(self, job: _PreparedRequest, index: int, loop: StepLoop) -> ImageOutput:
        """Generate one image, and send its previews as they become ready."""
        own = replace(job.request, seed=job.request.seed + index)
        masked = own.mask is not None or self._architecture.takes_masked_image
        scheduler = self._schedulers.make(
            own.scheduler,
            steps=own.num_inference_steps,
            timestep_spacing=own.timestep_spacing,
            sigmas=own.sigmas,
            eta=own.eta,
            image_tokens=self._architecture.image_tokens(*job.latent_init.shape[1:]),
            masked=masked,
        )
        trajectory = Trajectory(own, job.conditions, job.latent_init, scheduler, self._architecture)
        if trajectory.finished:
            return _unchanged_image(job, index)
        async with aclosing(loop.sample(trajectory, job.cancelled)) as outputs:
            async for latents in outputs:
                if latents.is_final:
                    image = await self._decode(latents, job, index)
                else:
                    await self._send_preview(latents, job, index)
        return image

    async def _send_preview(self, latents: LatentsOutput, job: _PreparedRequest, index: int) -> None:
        try:
            job.sender.send(response_of(await self._decode(latents, job, index)))
        except NonFiniteError as error:
            # The image may still be one, as where only the VAE of previews overflows.
            pb_utils.Logger.log_warn(f"no preview after step {latents.step}: {error}")

    async def _decode(self, output: LatentsOutput, job: _PreparedRequest, index: int) -> ImageOutput:
        pixels = await self._components.decode(output.latents, is_preview=not output.is_final)
        if job.request.image is not None and job.request.mask is not None:
            # In a thread: milliseconds for a large image, which would block the event loop.
            pixels = await asyncio.to_thread(composite, pixels, job.request.image, job.request.mask)
        return ImageOutput(
            pixels=pixels,
            index=index,
            step=output.step,
            is_final=output.is_final,
            seed=job.request.seed + index,
            prompt_tokens=job.prompt_tokens,
            truncated_tokens=job.truncated_tokens,
            timings=(output.waited, job.encode_seconds, output.took, time.perf_counter() - output.made),
            latents=output.latents if job.request.return_latents and output.is_final else None,
        )

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        factor = self._limits.vae_scale_factor
        return self._limits.latent_channels, request.height // factor, request.width // factor


def _unchanged_image(job: _PreparedRequest, index: int) -> ImageOutput:
    """The input image, if the strength leaves no step."""
    assert job.request.image is not None
    return ImageOutput(
        pixels=job.request.image,
        index=index,
        step=0,
        is_final=True,
        seed=job.request.seed + index,
        prompt_tokens=job.prompt_tokens,
        truncated_tokens=job.truncated_tokens,
        timings=(0.0, job.encode_seconds, 0.0, 0.0),
    )


def _with_copied_pixels(request: Request) -> Request:
    """The request with its images copied from Triton's memory."""
    return replace(
        request,
        image=None if request.image is None else request.image.copy(),
        mask=None if request.mask is None else request.mask.copy(),
        references=tuple(image.copy() for image in request.references),
    )
