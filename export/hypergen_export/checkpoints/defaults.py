"""The sampler's parameters for a checkpoint: its components, image sizes, default steps and guidance scale.

A checkpoint may state its defaults in `hypergen_defaults.json`. diffusers' layout has no place for them, so without
that file they are derived from its scheduler and its denoiser's config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.family import References
from hypergen_export.errors import BrokenCheckpointError

# Z-Image's transformer pads prompts to multiples of it anyway.
_TEXT_STEP = 32
# Guidance is distilled into the weights of few-step models, so a second row per image would be wasted.
_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
# Few-step models such as Turbo and Lightning are published with an Euler scheduler and trailing timesteps. Many models
# that need the usual number of steps are too, so one of these words must also occur in the checkpoint's names.
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# Three times what StableDiffusion3Pipeline's documentation advises.
_MAX_SKIP_LAYER_GUIDANCE_SCALE = 10.0
_IMAGE_GUIDANCE_SCALE, _MAX_IMAGE_GUIDANCE_SCALE = 1.5, 20.0
# As many images as an edit of OpenAI's API may have.
_MAX_REFERENCES = 16
# Wide enough for a reference image of one megapixel that is eight times as wide as high, as diffusers takes them.
_MAX_REFERENCE_SIDE = 4096
# Not the number before a count of training steps, as in "v2-step5000".
_STEPS = r"(?<![0-9])([1-8])[-_ ]?steps?(?!s?[-_ ]?[0-9]{3})"
_DISTILLED = re.compile(rf"turbo|lightning|hyper[-_ ]?sd|dmd|flash|distill|{_STEPS}", re.IGNORECASE)


def checkpoint_parameters(checkpoint: Checkpoint) -> dict[str, str]:
    """The sampler's parameters that depend on the checkpoint alone. Raises BrokenCheckpointError."""
    sizes = checkpoint.sizes
    factor = sizes["vae_scale_factor"]
    try:
        parameters: dict[str, int | float | str] = {
            **_size_limits(checkpoint),
            **_default_steps_and_guidance(checkpoint),
            **_image_guidance(checkpoint),
            **_prompt_syntax(checkpoint),
        }
        suggestions = _suggestions(checkpoint.defaults)
        references = _references(checkpoint)
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpointError(f"{checkpoint.folder}: a default is missing or invalid ({error})") from error
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in parameters.items()} | {
        "family": checkpoint.family.name,
        **_architecture(checkpoint),
        **references,
        "base_model": _base_model(checkpoint),
        "suggestions": suggestions,
        "size_factor": str(factor * sizes["patch_size"]),
        "vae_scale_factor": str(factor),
        "latent_channels": str(sizes["latent_channels"]),
    }


def _base_model(checkpoint: Checkpoint) -> str:
    """What a single file was made from: its conversion says it, or it replaces the transformer of a pipeline."""
    if checkpoint.family.denoiser.module in checkpoint.replaced:
        return checkpoint.family.name
    return str(checkpoint.index.get("_base_model", ""))


def _architecture(checkpoint: Checkpoint) -> dict[str, str]:
    """Parameters that state how the sampler combines the components."""
    family = checkpoint.family
    # The default is StableDiffusionXLPipeline's; only its families have the option.
    zeros = "size_embeds" in family.denoiser_inputs and checkpoint.index.get("force_zeros_for_empty_prompt", True)
    return {
        "components": ",".join(component.name for component in family.components),
        "denoiser": family.denoiser.name,
        "denoiser_inputs": ",".join(family.denoiser_inputs),
        **_embeddings(checkpoint),
        **{name: _parameter(value) for name, value in asdict(family.sampling).items()},
        "zeros_for_no_negative_prompt": str(int(bool(zeros))),
    }


def _parameter(value: str | int) -> str:
    return value if isinstance(value, str) else str(int(value))


def _embeddings(checkpoint: Checkpoint) -> dict[str, str]:
    """Parameters of the sinusoidal embeddings. Defaults are UNet2DConditionModel's, and what transformers have."""
    denoiser, sizes = checkpoint.denoiser_config, checkpoint.sizes
    return {
        "time_width": str(sizes["time_width"]),
        "size_width": str(sizes.get("sizes_width", 0) // 6),
        "flip_sin_to_cos": str(int(denoiser.get("flip_sin_to_cos", True))),
        "freq_shift": str(denoiser.get("freq_shift", 0)),
        "guidance_width": str(sizes.get("guidance_width", 0)),
        # Sana-Sprint's. Other transformers are given the scale as they are given timesteps.
        "guidance_factor": f"{denoiser.get('guidance_embeds_scale', 1000.0):g}",
    }


def text_padding(checkpoint: Checkpoint) -> int:
    """Prompts are padded to multiples of so many tokens: of a chunk, or in families that mask padding, of fewer.

    Images share denoiser calls only if their prompts have one padded length. So without chunks it is an eighth of the
    tokens of an image of the default size, but no longer than the longest prompt: the padding costs at most an eighth.
    """
    sizes = checkpoint.sizes
    if _max_chunks(checkpoint) > 1:
        return sizes["tokens"]
    limits = _size_limits(checkpoint)
    side = sizes["vae_scale_factor"] * sizes["patch_size"]
    image_tokens = (int(limits["default_width"]) // side) * (int(limits["default_height"]) // side)
    return min(sizes["tokens"], max(_TEXT_STEP, image_tokens // 8 // _TEXT_STEP * _TEXT_STEP))


def longest_text(checkpoint: Checkpoint) -> int:
    """The most tokens of a prompt that the denoiser takes."""
    return checkpoint.sizes["tokens"] * _max_chunks(checkpoint)


def _max_chunks(checkpoint: Checkpoint) -> int:
    return max(text.max_chunks for text in checkpoint.family.text)


def _default_steps_and_guidance(checkpoint: Checkpoint) -> dict[str, int | float]:
    stored = checkpoint.defaults
    steps, scale = _family_steps_and_guidance(checkpoint)
    return {
        "default_num_inference_steps": int(stored.get("num_inference_steps", steps)),
        # Model cards write 0 for "no guidance", the API 1 where that is the identity.
        "default_guidance_scale": max(_min_guidance_scale(checkpoint), float(stored.get("guidance_scale", scale))),
        "min_guidance_scale": _min_guidance_scale(checkpoint),
        **({"max_guidance_scale": 1.0} if checkpoint.family.sampling.guidance == "none" else {}),
        **_skip_layer_guidance(checkpoint),
    }


def _skip_layer_guidance(checkpoint: Checkpoint) -> dict[str, float]:
    """Its default and largest scale; both are 0 if the denoiser cannot skip layers."""
    largest = _MAX_SKIP_LAYER_GUIDANCE_SCALE if "skip" in checkpoint.family.denoiser_inputs else 0.0
    scale = float(checkpoint.defaults.get("skip_layer_guidance_scale", 0.0))
    if not 0 <= scale <= largest:
        raise ValueError(f"skip_layer_guidance_scale: must be from 0 to {largest:g}, not {scale:g}")
    return {"default_skip_layer_guidance_scale": scale, "max_skip_layer_guidance_scale": largest}


def _image_guidance(checkpoint: Checkpoint) -> dict[str, int | float]:
    """The guidance by the image that is edited by instruction; no other model has one. The default is diffusers'."""
    if checkpoint.family.sampling.guidance != "classifier_free_with_image":
        return {"default_image_guidance_scale": 0.0, "max_image_guidance_scale": 0.0}
    default = float(checkpoint.defaults.get("image_guidance_scale", _IMAGE_GUIDANCE_SCALE))
    if not 1.0 <= default <= _MAX_IMAGE_GUIDANCE_SCALE:
        raise ValueError(f"image_guidance_scale: must be from 1 to {_MAX_IMAGE_GUIDANCE_SCALE:g}, not {default:g}")
    return {"default_image_guidance_scale": default, "max_image_guidance_scale": _MAX_IMAGE_GUIDANCE_SCALE}


def _prompt_syntax(checkpoint: Checkpoint) -> dict[str, str | int]:
    """What the text encoders make possible: weights where prompts are read in chunks, and CLIP's earlier layers."""
    clip_skip, largest = int(checkpoint.defaults.get("clip_skip", 0)), checkpoint.sizes.get("max_clip_skip", 0)
    if not 0 <= clip_skip <= largest:
        raise ValueError(f"clip_skip: must be from 0 to {largest}, not {clip_skip}")
    return {
        "prompt_weightings": "none,a1111,compel" if _max_chunks(checkpoint) > 1 else "none",
        "default_prompt_weighting": "none",
        "default_clip_skip": clip_skip,
        "max_clip_skip": largest,
    }


def _min_guidance_scale(checkpoint: Checkpoint) -> float:
    """The guidance scale that is the identity, or 0 if the denoiser is given a scale that has none."""
    family = checkpoint.family
    from_zero = family.sampling.guidance == "classifier_free_from_zero" or "guidance" in family.denoiser_inputs
    return 0.0 if from_zero else 1.0


def _family_steps_and_guidance(checkpoint: Checkpoint) -> tuple[int, float]:
    family = checkpoint.family
    names = " ".join(checkpoint.names)
    steps, scale = family.read_card(checkpoint.denoiser_config, names) or (
        family.num_inference_steps,
        family.guidance_scale,
    )
    takes_guidance = "timestep_cond" in family.denoiser_inputs
    if takes_guidance or not _few_steps_reason(checkpoint):
        return steps, scale
    stated = re.search(_STEPS, names, re.IGNORECASE)
    # A scale that the denoiser is given is no second row, and is distilled with it.
    distilled_scale = scale if family.sampling.guidance == "embedded" else _min_guidance_scale(checkpoint)
    return int(stated[1]) if stated else family.distilled_steps, distilled_scale


def notices(checkpoint: Checkpoint) -> list[str]:
    """Notices for the operator about properties of the checkpoint that its images do not show, one line each."""
    found = []
    reason = _few_steps_reason(checkpoint)
    stated = {"num_inference_steps", "guidance_scale"} <= checkpoint.defaults.keys()
    if reason and not stated:
        steps, scale = _family_steps_and_guidance(checkpoint)
        found.append(f"taken for a few-step model ({reason}): by default {steps} steps, guidance scale {scale:g}")
    safety_checker = checkpoint.index.get("safety_checker") or [None]
    if safety_checker[-1] or checkpoint.index.get("requires_safety_checker"):
        found.append("the checkpoint has a safety checker, which is not run: images are not filtered")
    return found


def _few_steps_reason(checkpoint: Checkpoint) -> str:
    """Why the checkpoint is considered distilled to a few steps; empty if it is not."""
    scheduler = checkpoint.scheduler
    name = str(scheduler.get("_class_name"))
    if checkpoint.family.sampling.is_flow:
        # All have one scheduler. Families without guidance are distilled as a whole.
        word = _distilled_word(checkpoint)
        return f"'{word}' in its name" if word and checkpoint.family.sampling.guidance != "none" else ""
    if name in _FEW_STEP_SCHEDULERS:
        return f"its scheduler is {name}"
    # v-prediction or a rescaled schedule: a many-step model trained to zero terminal SNR.
    zero_terminal_snr = scheduler.get("prediction_type") == "v_prediction" or scheduler.get("rescale_betas_zero_snr")
    if name not in _EULER or scheduler.get("timestep_spacing") != "trailing" or zero_terminal_snr:
        return ""
    word = _distilled_word(checkpoint)
    return f"{name} with trailing timesteps, and '{word}' in its name" if word else ""


def _distilled_word(checkpoint: Checkpoint) -> str:
    """The word in the checkpoint's names that says that it is distilled; empty if there is none."""
    return next(filter(None, map(few_steps_word, checkpoint.names)), "")


def few_steps_word(name: str) -> str:
    """The word in a name that says that the model is distilled to a few steps; empty if there is none."""
    match = _DISTILLED.search(name)
    return match[0] if match else ""


def _references(checkpoint: Checkpoint) -> dict[str, str]:
    """The parameters of reference images; none are taken if `max_references` is 0."""
    references = checkpoint.family.references or References(count=0, pixels=0, position_step=0)
    return {
        "max_references": str(max_references(checkpoint)),
        "max_reference_pixels": str(references.pixels),
        "max_reference_side": str(_MAX_REFERENCE_SIDE),
        "preferred_reference_sizes": ",".join(references.sizes),
        "reference_position_step": str(references.position_step),
        "masked_image_yields": str(int(references.yields)),
        "token_width": str(checkpoint.sizes["token_width"]),
    }


def max_reference_tokens(checkpoint: Checkpoint) -> int:
    """The tokens of all reference images of a request; 0 if there are none."""
    sizes, references = checkpoint.sizes, checkpoint.family.references
    token = sizes["vae_scale_factor"] * sizes["patch_size"]
    return max_references(checkpoint) * references.pixels // token**2 if references else 0


def max_references(checkpoint: Checkpoint) -> int:
    """The number of reference images that a request may have. Raises ValueError."""
    references = checkpoint.family.references
    if references is None:
        return 0
    count = int(checkpoint.defaults.get("max_references", references.count))
    if not 1 <= count <= _MAX_REFERENCES:
        raise ValueError(f"max_references: must be from 1 to {_MAX_REFERENCES}, not {count}")
    return count


def _suggestions(stored: Mapping[str, Any]) -> str:
    """Example prompts, one per line."""
    prompts = stored.get("suggestions", [])
    if not isinstance(prompts, list) or not all(isinstance(one, str) and one.isprintable() for one in prompts):
        raise ValueError("suggestions: must be a list of strings without line breaks")
    return "\n".join(prompts)


def _size_limits(checkpoint: Checkpoint) -> dict[str, int | float]:
    """Default, smallest and largest width and height in pixels, all multiples of a denoiser's token or latent pixel.

    Quality is best near the training size. The minimum is 64, at which a UNet of four levels still has one latent
    pixel at its lowest level, or the default size if that is smaller. The maximum is twice the default, at which
    objects begin to repeat, and at least 1024, which clients of OpenAI's API often ask for.
    """
    stored = checkpoint.defaults
    factor = checkpoint.sizes["vae_scale_factor"] * checkpoint.sizes["patch_size"]
    height, width = _trained_size(checkpoint)
    width, height = int(stored.get("width", width)), int(stored.get("height", height))
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


def _trained_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels of the images that the denoiser was trained on."""
    if checkpoint.family.default_side:
        return checkpoint.family.default_side, checkpoint.family.default_side
    factor, config = checkpoint.sizes["vae_scale_factor"], checkpoint.denoiser_config
    sample_size = config["sample_size"]
    if isinstance(sample_size, int):
        legacy = checkpoint.overrides.min_legacy_sample_size if _is_older_than_0_9(config) else 0
        return max(sample_size, legacy) * factor, max(sample_size, legacy) * factor
    height, width = sample_size
    return int(height) * factor, int(width) * factor


def _is_older_than_0_9(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers before 0.9 saved the config. Raises ValueError."""
    saved_by = config.get("_diffusers_version")
    if saved_by is None:
        return False
    match = re.match(r"(\d+)\.(\d+)", str(saved_by))
    if not match:
        raise ValueError(f"_diffusers_version: {saved_by!r}")
    return (int(match[1]), int(match[2])) < (0, 9)
