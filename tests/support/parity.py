"""Runs the sampler with the exporter's modules in torch, for comparison with diffusers' pipeline."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image as PILImage

from hypergen_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hypergen_export.checkpoints.components import Component, LoraPool
from hypergen_export.checkpoints.defaults import checkpoint_parameters
from hypergen_export.checkpoints.embeddings import Embedding
from hypergen_export.checkpoints.families.unet import with_deep_cache
from hypergen_export.checkpoints.lora import Placement
from hypergen_export.checkpoints.schedulers import checkpoint_schedulers
from hypergen_export.conversion.embeddings import extend
from hypergen_export.conversion.examples import as_kwargs
from hypergen_export.conversion.loading import load_module
from hypergen_export.conversion.pooling import Pooled, PoolWeights, add_pool
from hypergen_export.conversion.tokenizer import text_parameters, write_tokenizer
from hypergen_export.conversion.wrappers import wrap
from hypergen_sampler.conditioning import Array, Conditioning, conditioning_of, merge, texts_of, with_lora_scales
from hypergen_sampler.latent_init import ImagePosterior, LatentInit, masked_image_of, references_of
from hypergen_sampler.prompts import PromptTokenizers
from hypergen_sampler.request import Architecture, Request
from hypergen_sampler.sampling import DenoiserInputs, Trajectory
from hypergen_sampler.schedulers import Schedulers
from hypergen_sampler.stepping import StepLoop
from support.architectures import model_config
from support.deep_cache import deep_features_reused
from support.guidance_interval import interval_arguments
from support.scheduler_tables import called_by_diffusers, schedulers_in

PROMPT = "a red rocket on a blue background"
# Relative to the largest latent. Both sides are torch in float32; ours runs the UNet on each image's own timestep.
TOLERANCE = 1e-5
# From an input image, the VAE's encoder adds its rounding, which the guidance scale multiplies. Seen: 1.3e-5.
TOLERANCE_FROM_IMAGE = 5e-5
Pixels = npt.NDArray[np.uint8]

IMAGE_TO_IMAGE = {
    "StableDiffusionPipeline": StableDiffusionImg2ImgPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLImg2ImgPipeline,
    "LatentConsistencyModelPipeline": LatentConsistencyModelImg2ImgPipeline,
}
INPAINTING = {
    "StableDiffusionPipeline": StableDiffusionInpaintPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLInpaintPipeline,
    "LatentConsistencyModelPipeline": StableDiffusionInpaintPipeline,
}


@dataclass
class Sampler:
    """The sampler as `model.py` puts it together, on torch modules in place of Triton's."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenize: PromptTokenizers
    schedulers: Schedulers
    modules: dict[str, torch.nn.Module]
    components: tuple[Component, ...]
    rows_of_calls: list[int] = field(default_factory=list)
    models_of_calls: list[str] = field(default_factory=list)
    _one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    async def generate(self, request: Request, loop: StepLoop | None = None) -> tuple[Array, Pixels]:
        """The final latents [C, h, w] and the image."""
        latents = (await self.outputs(request, loop))[-1]
        return latents, self.run("vae_decoder", latents=latents[None])["image"][0]

    async def outputs(self, request: Request, loop: StepLoop | None = None) -> list[Array]:
        """The latents [C, h, w] of the previews and last the final ones."""
        self.architecture.check(request)
        latent_init = self.latent_init(request)
        edited = latent_init.original if self.architecture.edits_by_instruction else None
        if edited is not None:
            latent_init = replace(latent_init, original=None)
        given = [self.run("vae_encoder", image=image[None])["mean"][0] for image in request.references]
        references = references_of(request, latent_init.original, given, self.architecture)
        conditions = conditioning_of(
            request, self.encode(request), self.architecture, references, None if edited is None else edited.mean
        )
        scheduler = self.schedulers.make(
            request.scheduler,
            steps=request.num_inference_steps,
            timestep_spacing=request.timestep_spacing,
            sigmas=request.sigmas,
            eta=request.eta,
            image_tokens=self.architecture.image_tokens(*latent_init.shape[1:]),
            masked=request.mask is not None or self.architecture.takes_masked_image,
        )
        image = Trajectory(request, conditions, latent_init, scheduler, self.architecture)
        return [output.latents async for output in (loop or self.loop()).sample(image, lambda: False)]

    def latent_init(self, request: Request) -> LatentInit:
        factor = self.checkpoint.sizes["vae_scale_factor"]
        shape = (self.checkpoint.sizes["latent_channels"], request.height // factor, request.width // factor)
        is_inpainting_model = self.architecture.takes_masked_image
        if request.image is None and not is_inpainting_model:
            return LatentInit(shape)
        return LatentInit(
            shape,
            None
            if request.image is None
            else self._posterior(request.image, np.ones(request.image.shape[:2], np.uint8)),
            request.mask,
            masked_image=self._posterior(*masked_image_of(request)) if is_inpainting_model else None,
            respaces_timesteps=self.architecture.is_latent_consistency,
            is_flow=bool(self.architecture.is_flow),
            starts_from_mode=bool(self.architecture.encodes_mode),
            interpolates_mask=self.architecture.latent_patch_size > 1,
        )

    def _posterior(self, image: Pixels, kept: Pixels) -> ImagePosterior:
        answer = self.run("vae_encoder", image=image[None], kept=kept[None, :, :, None])
        return ImagePosterior(answer["mean"][0], answer["std"][0])

    def loop(self) -> StepLoop:
        return StepLoop(self.denoise, max_rows=16, max_active=8, max_waiting=8)

    def encode(self, request: Request) -> Conditioning:
        tokens = self.tokenize(texts_of(request, self.architecture), request.prompt_weighting, request.clip_skip)
        answers = [
            self.run(text.encoder, **with_lora_scales(given, text, request))
            for text, given in zip(self.architecture.text_inputs, tokens.inputs, strict=True)
        ]
        return merge(answers, tokens, self.architecture)

    def denoise(self, rows: DenoiserInputs) -> dict[str, Array]:
        self.rows_of_calls.append(len(rows.sample))
        self.models_of_calls.append(rows.model)
        time = self.architecture.embed_timesteps(rows.timestep)
        inputs = {"sample": rows.sample, "time": time, **rows.conditions}
        answer = self.run(rows.model, **inputs)
        return {name: answer[name] for name in rows.outputs}

    def run(self, name: str, **inputs: npt.NDArray[Any]) -> dict[str, Any]:
        (component,) = (each for each in self.components if each.name == name)
        tensors = tuple(torch.from_numpy(inputs[tensor.name]) for tensor in component.inputs)
        # The loop calls from several threads, and a wrapper keeps what it is given in itself: the engines have copies.
        with self._one_at_a_time, torch.no_grad():
            answer = self.modules[name](**as_kwargs(component, tensors))
        answers = answer if isinstance(answer, tuple) else (answer,)
        return {tensor.name: one.numpy() for tensor, one in zip(component.outputs, answers, strict=True)}


@dataclass
class Pair:
    sampler: Sampler
    pipeline: Any

    def __post_init__(self) -> None:
        self._own = self.pipeline.scheduler

    def choose(self, scheduler: str, pipeline: Any = None) -> None:
        """Give diffusers' pipeline the scheduler that a request calls so; the checkpoint's own under no name."""
        pipeline = pipeline or self.pipeline
        pipeline.scheduler = called_by_diffusers(scheduler, self._own) if scheduler else self._own


def sampler_of(
    folder: Path,
    embeddings: tuple[Embedding, ...] = (),
    pool: LoraPool | None = None,
    placements: Sequence[Placement] = (),
) -> Sampler:
    """The sampler of a checkpoint, with textual inversions, and LoRAs in a rank pool."""
    checkpoint = replace(open_checkpoint(str(folder)), embeddings=embeddings)
    files = {text.tokenizer: folder / f"{text.tokenizer}.json" for text in checkpoint.family.text}
    for text in checkpoint.family.text:
        write_tokenizer(checkpoint, text, files[text.tokenizer])
    parameters = checkpoint_parameters(checkpoint) | text_parameters(checkpoint, files, pool)
    table = checkpoint_schedulers(checkpoint, int(parameters["default_num_inference_steps"]))
    architecture = Architecture.from_model_config(model_config({**parameters, "max_reference_rows": "16"}))
    flow = {name: parameters[name] for name in ("flow_sigmas", "flow_shift")}
    components = with_deep_cache(checkpoint.family.components)
    if pool:
        components = tuple(each.with_pool(pool) for each in components)
        denoiser_inputs = (*architecture.denoiser_inputs, pool.scales.name)
        architecture = replace(architecture, denoiser_inputs=denoiser_inputs)
    modules = {each.name: _wrapped(checkpoint, each, placements) for each in components}
    tokenize = PromptTokenizers(folder, architecture.text_inputs)
    return Sampler(checkpoint, architecture, tokenize, schedulers_in(table, **flow), modules, components)


def _wrapped(checkpoint: Checkpoint, component: Component, placements: Sequence[Placement]) -> torch.nn.Module:
    module = _module_of(checkpoint, component)
    if component.pool is None:
        return wrap(component, module)
    with tempfile.TemporaryDirectory() as folder:
        weights = PoolWeights(Path(folder))
        weights.create(component.module, module, component.pool, torch.float32)
        weights.fill(placements)
        tensors = {name: source.read() for name, source in weights.sources().items()}
    scales = add_pool(module, component.pool, tensors.__getitem__)
    return Pooled(wrap(component, module), scales)


def _module_of(checkpoint: Checkpoint, component: Component) -> torch.nn.Module:
    module = load_module(checkpoint, component)
    if checkpoint.embeddings and component.module in checkpoint.text_encoders:
        extend(checkpoint, component.module, module)
    return module


def request_of(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": None,
        "num_images": 1,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "scheduler": "",
        "seed": 11,
    }
    return Request(**(fields | changes))


def by_diffusers(pipeline: Any, request: Request) -> tuple[Array, Pixels]:
    """The final latents and the image, of one call."""
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        **_inputs_of(pipeline)(request),
    }
    if request.negative_prompt is not None:
        fields["negative_prompt"] = request.negative_prompt
    for name in ("eta", "guidance_rescale"):
        if getattr(request, name):
            fields[name] = getattr(request, name)
    interval = (request.guidance_start, request.guidance_end)
    if interval != (0.0, 1.0):
        fields = interval_arguments(pipeline, fields, *interval)

    def generate(**further: Any) -> Any:
        with deep_features_reused(pipeline.unet, request.cache_interval):
            return pipeline(**fields, **further, generator=torch.Generator().manual_seed(request.seed)).images[0]

    if type(pipeline).__name__ == "StableDiffusionXLInstructPix2PixPipeline":  # which calls nobody after a step
        return generate(output_type="latent").numpy(), np.asarray(generate())
    after_step, tensors = (fields.pop(f"callback_on_step_end{name}", None) for name in ("", "_tensor_inputs"))
    latents: list[torch.Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents[:] = given["latents"]
        changed: dict[str, Any] = after_step(pipeline, step, timestep, given) if after_step else given
        return changed

    image = generate(callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents", *(tensors or ())])
    return latents[0].numpy(), np.asarray(image)


def _inputs_of(pipeline: Any) -> Callable[[Request], dict[str, Any]]:
    """Size and images, as the kind of pipeline takes them."""
    if type(pipeline).__name__ == "StableDiffusionInstructPix2PixPipeline":
        return _given_to_edit  # which has the image's own size
    if type(pipeline).__name__ == "StableDiffusionXLInstructPix2PixPipeline":
        return lambda request: {**_given_to_edit(request), "width": request.width, "height": request.height}
    return _given_to_inpainting_model if _is_inpainting_model(pipeline) else _given


def _given_to_edit(request: Request) -> dict[str, Any]:
    assert request.image is not None
    return {"image": PILImage.fromarray(request.image), "image_guidance_scale": request.image_guidance_scale}


def _given(request: Request) -> dict[str, Any]:
    """The size, or the input image that has it."""
    size = {"width": request.width, "height": request.height}
    if request.image is None:
        return size
    start = {"image": PILImage.fromarray(request.image), "strength": request.strength}
    if request.mask is None:
        return start
    return {**size, **start, "mask_image": PILImage.fromarray(request.mask)}


def _is_inpainting_model(pipeline: Any) -> bool:
    """Whether its UNet takes a mask and a masked image, without which diffusers does not call it."""
    is_one: bool = getattr(getattr(pipeline, "unet", None), "config", {}).get("in_channels") == 9
    return is_one


def _given_to_inpainting_model(request: Request) -> dict[str, Any]:
    """Without a mask everything is repainted; without an image its pixels do not matter, then."""
    size = (request.height, request.width)
    image = np.full((*size, 3), 90, np.uint8) if request.image is None else request.image
    covered = np.full(size, 255, np.uint8) if request.mask is None else request.mask
    return {
        "width": request.width,
        "height": request.height,
        "image": PILImage.fromarray(image),
        "mask_image": PILImage.fromarray(covered),
        "strength": request.strength,
    }


def held(ours: tuple[Array, Pixels], theirs: tuple[Array, Pixels], tolerance: float = TOLERANCE) -> None:
    """Latents to rounding, images to a level of 255 where a value lies on the edge of two."""
    difference = float(np.abs(ours[0] - theirs[0]).max() / np.abs(theirs[0]).max())
    levels = np.abs(ours[1].astype(int) - theirs[1].astype(int))
    print(f"latents differ by {difference:.1e} of the largest, images by {levels.mean():.4f}/255, {levels.max()}/255")
    assert theirs[1].std() > 10, "a flat image would prove nothing"
    assert difference <= tolerance
    assert levels.max() <= 1
    assert levels.mean() <= 0.01


def input_image(width: int = 64, height: int = 64) -> Pixels:
    """Something to start from: colours that change smoothly, and an edge."""
    y, x = np.mgrid[0:height, 0:width]
    red, green, blue = x * 255 // width, y * 255 // height, np.where(x > y, 220, 40)
    colours: Pixels = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    return colours


def mask(width: int = 64, height: int = 64) -> Pixels:
    """Repaints a part whose edges are no multiples of eight, with greys on both sides of the threshold."""
    covered = np.zeros((height, width), dtype=np.uint8)
    covered[10:45, 20:60] = 255
    covered[10:45, 20:24] = 127
    covered[10:45, 24:28] = 128
    return covered


async def held_from_image(pair: Pair, request: Request) -> None:
    """Our image-to-image or inpainting against the pipeline of diffusers that its own text-to-image one stands for."""
    pipelines = IMAGE_TO_IMAGE if request.mask is None else INPAINTING
    pipeline = pair.pipeline
    if not _is_inpainting_model(pipeline):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = pipelines[type(pair.pipeline).__name__].from_pipe(
                pair.pipeline,
                vae=pair.pipeline.vae,  # also one that its type hints leave out
            )
        pipeline.set_progress_bar_config(disable=True)
    pair.choose(request.scheduler, pipeline)
    held(await pair.sampler.generate(request), by_diffusers(pipeline, request), TOLERANCE_FROM_IMAGE)
