"""What the sampler is told about a checkpoint, as parameters: its components, sizes, steps, guidance.

A checkpoint may bring its own habits in `hypergen_defaults.json`; diffusers' layout has no place for them, so without
that file they are read from its scheduler and UNet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.errors import BrokenCheckpointError

# Steps and guidance scale. Those of models that are not distilled are the defaults of diffusers' pipelines.
_DEFAULT_STEPS_AND_GUIDANCE = {
    "stable-diffusion": (50, 7.5),
    "stable-diffusion-xl": (50, 5.0),
    # LatentConsistencyModelPipeline's: the scale goes into the UNet and costs nothing.
    "latent-consistency": (4, 8.5),
    "latent-consistency-xl": (4, 8.5),
}
# Guidance is distilled into the weights, and a second row per image would be wasted: scale 1 is none.
_FEW_STEPS = (4, 1.0)
_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
# How the few-step models of the Turbo and Lightning kind are published: Euler from the very last timestep. So are many
# that take as many steps as others, wherefore one of these words must be in what the checkpoint is called, too.
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_DISTILLED = re.compile(r"turbo|lightning|hyper[-_ ]?sd|dmd|flash|distill|(?<![0-9])[1-8][-_ ]?steps?", re.IGNORECASE)


def checkpoint_parameters(checkpoint: Checkpoint) -> dict[str, str]:
    """The parameters of the sampler that follow from the checkpoint alone. Raises BrokenCheckpointError."""
    sizes = checkpoint.sizes
    factor = sizes["vae_scale_factor"]
    try:
        parameters = _sides(checkpoint, factor) | _default_steps_and_guidance(checkpoint)
        suggestions = _suggestions(checkpoint.defaults)
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpointError(f"{checkpoint.folder}: a default is missing or of no use ({error})") from error
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in parameters.items()} | {
        "family": checkpoint.family.name,
        **_architecture(checkpoint),
        "suggestions": suggestions,
        # Every text has a start and an end.
        "max_prompt_tokens": str(sizes["tokens"] - 2),
        "size_factor": str(factor),
        "vae_scale_factor": str(factor),
        "latent_channels": str(sizes["latent_channels"]),
    }


def _architecture(checkpoint: Checkpoint) -> dict[str, str]:
    """How the sampler puts the components together."""
    family = checkpoint.family
    # The default of diffusers' pipeline, where the index does not say; other families have no such thing.
    zeros = "text_embeds" in family.denoiser_inputs and checkpoint.index.get("force_zeros_for_empty_prompt", True)
    return {
        "components": ",".join(component.name for component in family.components),
        "text_encoders": ",".join(component.name for component in family.text_encoders),
        "tokenizers": ",".join(family.tokenizers),
        "denoiser": family.denoiser,
        "denoiser_inputs": ",".join(family.denoiser_inputs),
        **_embeddings(checkpoint),
        "guidance_width": str(checkpoint.sizes.get("guidance_width", 0)),
        "zeros_for_no_negative_prompt": str(int(bool(zeros))),
    }


def _embeddings(checkpoint: Checkpoint) -> dict[str, str]:
    """How the sampler embeds timesteps and sides, with the defaults of UNet2DConditionModel."""
    unet, sizes = checkpoint.config("unet"), checkpoint.sizes
    return {
        "time_width": str(sizes["time_width"]),
        "size_width": str(sizes["sizes_width"] // 6),
        "flip_sin_to_cos": str(int(unet.get("flip_sin_to_cos", True))),
        "freq_shift": str(unet.get("freq_shift", 0)),
    }


def _default_steps_and_guidance(checkpoint: Checkpoint) -> dict[str, int | float]:
    stored = checkpoint.defaults
    steps, scale = _usual_steps_and_guidance(checkpoint)
    return {
        "default_num_inference_steps": int(stored.get("num_inference_steps", steps)),
        # Model cards write 0 for "no guidance", the API 1; the pictures are the same.
        "default_guidance_scale": max(1.0, float(stored.get("guidance_scale", scale))),
    }


def _usual_steps_and_guidance(checkpoint: Checkpoint) -> tuple[int, float]:
    takes_guidance = "timestep_cond" in checkpoint.family.denoiser_inputs
    if not takes_guidance and _few_steps_reason(checkpoint):
        return _FEW_STEPS
    return _DEFAULT_STEPS_AND_GUIDANCE[checkpoint.family.name]


def remarks(checkpoint: Checkpoint) -> list[str]:
    """What whoever serves the checkpoint should know, as it cannot be seen from its pictures."""
    said = []
    reason = _few_steps_reason(checkpoint)
    stated = {"num_inference_steps", "guidance_scale"} <= checkpoint.defaults.keys()
    if reason and not stated:
        steps, scale = _usual_steps_and_guidance(checkpoint)
        said.append(f"taken for a few-step model ({reason}): by default {steps} steps, guidance scale {scale:g}")
    safety_checker = checkpoint.index.get("safety_checker") or [None]
    if safety_checker[-1] or checkpoint.index.get("requires_safety_checker"):
        said.append("the checkpoint comes with a safety checker; none is run, and images are not filtered")
    return said


def _few_steps_reason(checkpoint: Checkpoint) -> str:
    """What shows that the checkpoint is distilled to a few steps; empty where nothing does."""
    scheduler = checkpoint.scheduler
    name = str(scheduler.get("_class_name"))
    if name in _FEW_STEP_SCHEDULERS:
        return f"its scheduler is {name}"
    # With v-prediction or a rescaled schedule it is a many-step model trained to zero terminal noise.
    ends_in_noise = scheduler.get("prediction_type") == "v_prediction" or scheduler.get("rescale_betas_zero_snr")
    if name not in _EULER or scheduler.get("timestep_spacing") != "trailing" or ends_in_noise:
        return ""
    word = next(filter(None, map(_DISTILLED.search, checkpoint.names)), None)
    return f"{name} with trailing timesteps, and '{word[0]}' in its name" if word else ""


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
    height, width = _trained_size(checkpoint.config("unet"), checkpoint.amendments.least_old_sample_size)
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


def _trained_size(unet: Mapping[str, Any], least_if_old: int) -> tuple[int, int]:
    """Height and width of the latents that the UNet was trained on."""
    sample_size = unet["sample_size"]
    if isinstance(sample_size, int):
        side = max(sample_size, least_if_old) if _is_older_than_0_9(unet) else sample_size
        return side, side
    height, width = sample_size
    return int(height), int(width)


def _is_older_than_0_9(unet: Mapping[str, Any]) -> bool:
    saved_by = unet.get("_diffusers_version")
    return saved_by is not None and Version(Version(saved_by).base_version) < Version("0.9.0.dev0")
