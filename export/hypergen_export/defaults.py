"""What the sampler tells its clients about a checkpoint, as parameters: sizes, steps, guidance, scheduler, suggestions.

A checkpoint may bring its own in `hypergen_defaults.json`; diffusers' layout has no place for them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hypergen_export.checkpoint import Checkpoint
from hypergen_export.errors import BrokenCheckpointError

# diffusers' class -> the name under which a request asks for it.
_SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
_NUM_INFERENCE_STEPS = 50  # diffusers' own defaults
_GUIDANCE_SCALE = 7.5


def checkpoint_parameters(checkpoint: Checkpoint, known_schedulers: Collection[str]) -> dict[str, str]:
    """The parameters of the sampler that follow from the checkpoint alone. Raises BrokenCheckpointError."""
    sizes = checkpoint.sizes
    factor = sizes["vae_scale_factor"]
    try:
        parameters = _sides(checkpoint, factor) | _habits(checkpoint.defaults)
        suggestions = _suggestions(checkpoint.defaults)
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpointError(f"{checkpoint.folder}: a default is missing or of no use ({error})") from error
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in parameters.items()} | {
        "family": checkpoint.family.name,
        "default_scheduler": scheduler_name(checkpoint.scheduler, known_schedulers),
        "suggestions": suggestions,
        "size_factor": str(factor),
        "vae_scale_factor": str(factor),
        "latent_channels": str(sizes["latent_channels"]),
    }


def scheduler_name(config: Mapping[str, Any], known: Collection[str]) -> str:
    """The request's name for a checkpoint's scheduler; the class's own where no request could ask for it."""
    class_name = str(config.get("_class_name"))
    name = _SCHEDULERS.get(class_name, class_name)
    if name == "dpmpp_2m":
        if config.get("algorithm_type", "dpmsolver++") != "dpmsolver++":
            name = class_name
        elif config.get("use_karras_sigmas"):
            name = "dpmpp_2m_karras"
    return name if name in known else class_name


def _habits(stored: Mapping[str, Any]) -> dict[str, int | float]:
    return {
        "default_num_inference_steps": int(stored.get("num_inference_steps", _NUM_INFERENCE_STEPS)),
        "default_guidance_scale": float(stored.get("guidance_scale", _GUIDANCE_SCALE)),
    }


def _suggestions(stored: Mapping[str, Any]) -> str:
    """Prompts worth trying, one a line."""
    prompts = stored.get("suggestions", [])
    if not isinstance(prompts, list) or not all(isinstance(one, str) and one.isprintable() for one in prompts):
        raise ValueError("suggestions: not a list of lines")
    return "\n".join(prompts)


def _sides(checkpoint: Checkpoint, factor: int) -> dict[str, int | float]:
    """Default and legal sides in pixels, all multiples of `factor`.

    A model draws well near the size it was trained at. The smallest side is 64, where a UNet of four levels still has
    one latent pixel at the bottom, or the default where that is smaller yet. The largest is twice the default, where
    objects begin to repeat, and never below 1024, which clients of OpenAI's API ask for by habit.
    """
    stored = checkpoint.defaults
    height, width = _trained_size(checkpoint.config("unet")["sample_size"])
    width, height = int(stored.get("width", width * factor)), int(stored.get("height", height * factor))
    smallest = int(stored.get("min_size", min(64, width, height)))
    largest = int(stored.get("max_size", max(1024, 2 * width, 2 * height)))
    if width % factor or height % factor or not smallest <= min(width, height) <= max(width, height) <= largest:
        raise ValueError(f"width {width}, height {height}, min_size {smallest}, max_size {largest}: not consistent")
    return {
        "default_width": width,
        "default_height": height,
        "min_size": -(-smallest // factor) * factor,
        "max_size": largest // factor * factor,
    }


def _trained_size(sample_size: Any) -> tuple[int, int]:
    """Height and width of the latents that the UNet was trained on."""
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return int(height), int(width)
