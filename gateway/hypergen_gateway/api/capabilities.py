"""The served model's capabilities, in the API's terms: an extension for clients that offer choices to a user."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel, Field

from hypergen_gateway.generation.backend import ModelDescription
from hypergen_gateway.generation.sizes import PolicyName, SizePolicy


class LoraCapability(BaseModel):
    """A LoRA that requests may name."""

    name: str
    default_scale: float
    scales: tuple[float, ...] = Field(
        description="The only scales at which it is served, as it is merged into the weights; empty if it has any."
    )


class QualityCapability(BaseModel):
    """How far images of a setting are from those of the model in float32 at equal seeds, as it was measured."""

    fields: dict[str, int | float | str] = Field(
        description="The request's fields beside the defaults; empty: images by default."
    )
    prompts: int = Field(description="How many images were compared. All other values are their mean or worst.")
    psnr: float = Field(description="Peak signal-to-noise ratio in dB; 100 for equal images.")
    lowest_psnr: float
    ssim: float = Field(description="Structural similarity; 1 for equal images.")
    lowest_ssim: float
    latents_error: float | None = Field(
        default=None, description="Error of the final latents, relative to their norm; absent if it is unknown."
    )
    highest_latents_error: float | None = None
    time: float = Field(description="Time of an image divided by its time in float32, when this was measured.")


class Capabilities(BaseModel):
    """What the served model supports: the values that a request may have, and the defaults.

    An extension of the API, for clients that offer choices, such as the playground.
    """

    object: Literal["capabilities"] = "capabilities"
    model: str
    base_model: str = Field(description="What a single file is made from, such as `Stable Diffusion XL`; else empty.")
    default_size: str
    sizes: tuple[str, ...] = Field(
        description="All sizes that the model generates; empty if it generates every size within the limits."
    )
    size_factor: int = Field(description="Width and height are multiples of this.")
    min_size: int
    max_size: int
    size_policy: PolicyName = Field(
        description="`fit`: any size may be requested, and is scaled from the nearest of these; `strict`: only these."
    )
    max_side: int = Field(description="The longest side that may be requested, in pixels.")
    default_num_inference_steps: int
    max_num_inference_steps: int
    default_guidance_scale: float
    min_guidance_scale: float = Field(
        description="The scale without guidance, at which a step takes half the work. Where guidance is not from a "
        "negative prompt, the lowest legal scale."
    )
    max_guidance_scale: float = Field(description="`min_guidance_scale` if the model takes no guidance.")
    default_image_guidance_scale: float
    max_image_guidance_scale: float = Field(
        description="0 if the model does not edit by instruction. One that does has no other requests than edits and "
        "variations, which start from noise, without `strength`."
    )
    negative_prompt: bool = Field(description="Whether `negative_prompt` is supported.")
    guidance_interval: bool = Field(description="Whether `guidance_start` and `guidance_end` are supported.")
    guidance_rescale: bool = Field(description="Whether `guidance_rescale` is supported.")
    max_cache_interval: int = Field(description="1 if the model is served without `--deep-cache`.")
    max_prompt_tokens: int = Field(
        description="The tokens of a prompt, and of a negative prompt, that the text encoders read, at most: CLIP in "
        "chunks of 75. The rest is cut off; `x-hypergen-prompt-truncated` and `prompt_truncated` say how many."
    )
    prompt_weightings: tuple[str, ...] = Field(description="The legal values of `prompt_weighting`.")
    default_prompt_weighting: str
    embeddings: tuple[str, ...] = Field(description="Words that stand for textual inversions in prompts.")
    max_clip_skip: int = Field(description="0 if the model's text encoders do not skip layers.")
    default_clip_skip: int
    max_skip_layer_guidance_scale: float = Field(description="0 if the model has no skip-layer guidance.")
    default_skip_layer_guidance_scale: float
    max_num_images: int
    schedulers: tuple[str, ...]
    edits: bool = Field(description="Whether edits and variations are supported.")
    max_references: int = Field(
        description="How many input images an edit may have as references for the prompt. 0 if the model takes none: "
        "edits start from their input images."
    )
    loras: tuple[LoraCapability, ...] = Field(description="The LoRAs for `loras` and `lora_path`.")
    suggestions: tuple[str, ...] = Field(description="Prompts that work well with the model.")
    passport: tuple[QualityCapability, ...] = Field(
        description="The price of the model's precision, and of settings that leave out work, by `hypergen passport`; "
        "empty if it was not measured."
    )


def of_model(model: ModelDescription, id_: str, sizes: SizePolicy) -> Capabilities:
    """A model's capabilities, in the API's terms."""
    return Capabilities(
        model=id_,
        base_model=model.base_model,
        default_size=f"{model.default_width}x{model.default_height}",
        sizes=model.sizes,
        size_factor=model.size_factor,
        min_size=model.min_size,
        max_size=model.max_size,
        size_policy=sizes.name,
        max_side=sizes.limit(model),
        default_num_inference_steps=model.default_num_inference_steps,
        max_num_inference_steps=model.max_num_inference_steps,
        default_guidance_scale=model.default_guidance_scale,
        min_guidance_scale=model.min_guidance_scale,
        max_guidance_scale=model.max_guidance_scale,
        default_image_guidance_scale=model.default_image_guidance_scale,
        max_image_guidance_scale=model.max_image_guidance_scale,
        negative_prompt=model.has_negative_prompt,
        guidance_interval=model.has_negative_prompt,
        guidance_rescale=model.guidance == "classifier_free",
        max_cache_interval=model.max_cache_interval,
        max_prompt_tokens=model.max_prompt_tokens,
        prompt_weightings=model.prompt_weightings,
        default_prompt_weighting=model.default_prompt_weighting,
        embeddings=model.embeddings,
        max_clip_skip=model.max_clip_skip,
        default_clip_skip=model.default_clip_skip,
        max_skip_layer_guidance_scale=model.max_skip_layer_guidance_scale,
        default_skip_layer_guidance_scale=model.default_skip_layer_guidance_scale,
        max_num_images=model.max_num_images,
        schedulers=model.schedulers,
        edits="vae_encoder" in model.components,
        max_references=model.max_references,
        loras=_loras(model),
        suggestions=model.suggestions,
        passport=tuple(QualityCapability(**asdict(quality)) for quality in model.passport),
    )


def _loras(model: ModelDescription) -> tuple[LoraCapability, ...]:
    scales: dict[str, list[float]] = {}
    merged = {lora.name for lora in model.loras if lora.is_merged}
    for lora in model.loras:
        scales.setdefault(lora.name, []).append(lora.scale)
    return tuple(
        LoraCapability(name=name, default_scale=known[0], scales=tuple(known) if name in merged else ())
        for name, known in scales.items()
    )
