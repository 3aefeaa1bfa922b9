"""The served model's capabilities, in the API's terms: an extension for clients that offer choices to a user."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from hypergen_gateway.generation.backend import ModelDescription
from hypergen_gateway.generation.sizes import PolicyName, SizePolicy


class Capabilities(BaseModel):
    """What the served model draws and how: the values that a request may hold, and those it gets without saying any.

    An extension of the API, for whoever offers choices, as the playground does.
    """

    object: Literal["capabilities"] = "capabilities"
    model: str
    default_size: str
    sizes: tuple[str, ...] = Field(description="All that can be drawn; empty where every size within the limits can.")
    size_factor: int = Field(description="Width and height are multiples of it.")
    min_size: int
    max_size: int
    size_policy: PolicyName = Field(
        description="`fit`: any size may be asked for, and is scaled from the nearest of these; `strict`: only these."
    )
    max_side: int = Field(description="Pixels a side that may be asked for.")
    default_num_inference_steps: int
    max_num_inference_steps: int
    default_guidance_scale: float
    max_guidance_scale: float
    guidance_interval: bool = Field(description="Whether `guidance_start` and `guidance_end` can be said.")
    max_cache_interval: int = Field(description="1 where the model is served without `--deep-cache`.")
    max_prompt_tokens: int = Field(
        description="Of a prompt, and of a negative prompt, what the text encoder reads; the rest is cut off, which "
        "`x-hypergen-prompt-truncated` and `prompt_truncated` tell."
    )
    max_num_images: int
    schedulers: tuple[str, ...]
    edits: bool = Field(description="Whether images can start from images.")
    suggestions: tuple[str, ...] = Field(description="Prompts that the model draws well.")


def of_model(model: ModelDescription, id_: str, sizes: SizePolicy) -> Capabilities:
    """A model's capabilities, in the API's terms."""
    return Capabilities(
        model=id_,
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
        max_guidance_scale=model.max_guidance_scale,
        guidance_interval=model.guidance_width == 0,
        max_cache_interval=model.max_cache_interval,
        max_prompt_tokens=model.max_prompt_tokens,
        max_num_images=model.max_num_images,
        schedulers=model.schedulers,
        edits="vae_encoder" in model.components,
        suggestions=model.suggestions,
    )
