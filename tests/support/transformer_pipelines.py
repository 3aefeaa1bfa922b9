"""diffusers' pipelines of transformer families, called as a request asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from PIL import Image as PILImage

from hypergen_sampler.conditioning import Array
from hypergen_sampler.request import Request
from support.parity import Pixels
from support.sana_from_image import SanaFromImagePipeline

# Family -> diffusers' pipelines for an input image, without and with a mask.
FROM_IMAGE: Mapping[str, tuple[Any, Any]] = {
    "flux1-dev": (FluxImg2ImgPipeline, FluxInpaintPipeline),
    "chroma": (ChromaImg2ImgPipeline, ChromaInpaintPipeline),
    "stable-diffusion-3": (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline),
    "qwen-image": (QwenImageImg2ImgPipeline, QwenImageInpaintPipeline),
    "z-image": (ZImageImg2ImgPipeline, ZImageInpaintPipeline),
    "sana": (SanaFromImagePipeline, SanaFromImagePipeline),
    "sana-1.5": (SanaFromImagePipeline, SanaFromImagePipeline),
}
# Further families that diffusers has only inpainting of.
INPAINTING: Mapping[str, Any] = {
    **{family: inpainting for family, (_, inpainting) in FROM_IMAGE.items()},
    "flux1-kontext": FluxKontextInpaintPipeline,
    "flux2-klein": Flux2KleinInpaintPipeline,
}
_KONTEXT = (FluxKontextPipeline, FluxKontextInpaintPipeline)
_FLUX1 = (FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, *_KONTEXT)
_SPRINT = (SanaSprintPipeline, SanaSprintImg2ImgPipeline)
_CHROMA = (ChromaPipeline, ChromaImg2ImgPipeline, ChromaInpaintPipeline)


def pipeline_from_image(family: str, pipeline: Any, *, masked: bool) -> Any:
    """The pipeline for image-to-image, or for inpainting, with the same modules."""
    made = (INPAINTING[family] if masked else FROM_IMAGE[family][0])(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    if isinstance(made, ChromaInpaintPipeline):
        made.transformer.register_to_config(guidance_embeds=False)  # it reads an entry that the model does not have
    return made


def image_by_diffusers(pipeline: Any, request: Request) -> tuple[Array, Pixels]:
    """The final latents [C, h, w] in the sampler's layout, and the image."""
    latents: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [given["latents"]]
        return {}

    image = pipeline(**_arguments(pipeline, request), callback_on_step_end=keep).images[0]
    if isinstance(pipeline, StableDiffusion3InpaintPipeline):
        image = _decoded_with_shift(pipeline, latents[0])
    if type(pipeline).__name__.startswith("QwenImage"):
        frames = pipeline._unpack_latents(latents[0], request.height, request.width, pipeline.vae_scale_factor)
        latents[0] = frames[:, :, 0]
    if isinstance(pipeline, _SPRINT):
        latents[0] = latents[0] / pipeline.scheduler.config.sigma_data
    if isinstance(pipeline, _FLUX1 + _CHROMA):
        latents[0] = pipeline._unpack_latents(latents[0], request.height, request.width, pipeline.vae_scale_factor)
    return _in_our_layout(latents[0], request), (image * 255).round().astype(np.uint8)


def _decoded_with_shift(pipeline: Any, latents: torch.Tensor) -> Any:
    """The image of the latents. The pipeline itself leaves out the VAE's shift."""
    config = pipeline.vae.config
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="np")[0]


def _arguments(pipeline: Any, request: Request) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        **_given(request),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "np",
    }
    if isinstance(pipeline, _FLUX1) and not pipeline.transformer.config.guidance_embeds:
        arguments["max_sequence_length"] = 256  # as FLUX.1-schnell was published
    if isinstance(pipeline, ChromaInpaintPipeline):
        arguments["max_sequence_length"] = 512  # as in the other two
    if isinstance(pipeline, _SPRINT) and request.num_inference_steps != 2:
        arguments["intermediate_timesteps"] = None  # it is the second of two
    if isinstance(pipeline, (SanaPipeline, *_SPRINT)):
        arguments["use_resolution_binning"] = False  # or it scales an image of another size
    if isinstance(pipeline, Flux2KleinPipeline | Flux2KleinInpaintPipeline):
        states = pipeline.text_encoder.config.num_hidden_layers + 1
        arguments["text_encoder_out_layers"] = tuple(index % states for index in (9, 18, 27))
    if isinstance(pipeline, _KONTEXT):
        # As sizes are asked for, instead of those of its training.
        arguments |= {"max_area": request.width * request.height, "_auto_resize": False}
    if request.skip_layer_guidance_scale:
        arguments |= {
            "skip_guidance_layers": [1],  # the middle one of the miniature's
            **{name: getattr(request, name) for name in vars(request) if name.startswith("skip_layer_guidance")},
        }
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    if type(pipeline).__name__.startswith("QwenImage"):
        # It guides only where a negative prompt is given; ours takes the empty one instead.
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        arguments["negative_prompt"] = request.negative_prompt or ""
    return arguments


def _given(request: Request) -> dict[str, Any]:
    given: dict[str, Any] = {"width": request.width, "height": request.height}
    if request.image is not None:
        given |= {"image": PILImage.fromarray(request.image), "strength": request.strength}
    if request.mask is not None:
        given["mask_image"] = PILImage.fromarray(request.mask)
    references = [PILImage.fromarray(image) for image in request.references]
    if references and request.image is None:
        given["image"] = references
    elif references:
        (given["image_reference"],) = references
    return given


def _in_our_layout(latents: torch.Tensor, request: Request) -> Array:
    if latents.ndim == 4:
        return np.asarray(latents[0].numpy())
    # FLUX.2: a token is 16 pixels wide and high.
    height, width = request.height // 16, request.width // 16
    tokens = latents[0].transpose(0, 1)
    return np.asarray(tokens.reshape(-1, height, width).numpy())
