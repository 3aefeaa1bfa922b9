"""diffusers' pipelines with guidance in an interval of the steps, as a reference for ours.

The pipelines have no argument for it, but a callback can change scale and embeddings after every step. diffusers' own
guider determines the guided steps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance

# Arguments of a pipeline's call, and for each the rows of both prompts, the negative one first.
Embeddings = dict[str, torch.Tensor]


@cache
def guided_steps(steps: int, start: float, end: float) -> list[int]:
    """The steps that diffusers' guider guides."""
    guider = ClassifierFreeGuidance(guidance_scale=7.5, start=start, stop=end)
    return [step for step in range(steps) if _guides(guider, step, steps)]


def _guides(guider: Any, step: int, steps: int) -> bool:
    guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(0))
    return bool(guider.num_conditions == 2)


def interval_arguments(pipeline: Any, fields: dict[str, Any], start: float, end: float) -> dict[str, Any]:
    """`fields`, the arguments of the pipeline's call, so that it guides in the interval alone."""
    embeddings = embeddings_of(pipeline, fields)

    def scale_in(step: int) -> float:
        is_guided = step in guided_steps(pipeline.num_timesteps, start, end)
        return float(fields["guidance_scale"]) if is_guided else 1.0

    def after_step(_: Any, step: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipeline._guidance_scale = scale_in(step + 1)
        rows = 2 if pipeline._guidance_scale > 1 else 1
        return given | {name: both[-rows:] for name, both in embeddings.items()}

    first = fields["guidance_scale"] if start == 0 and end > 0 else 1.0
    return fields | {
        "guidance_scale": first,
        "callback_on_step_end": after_step,
        "callback_on_step_end_tensor_inputs": list(embeddings),
    }


def embeddings_of(pipeline: Any, fields: dict[str, Any]) -> Embeddings:
    """What the pipeline makes of both prompts, under the names that its callback knows."""
    asked: dict[str, Any] = {
        "prompt": fields["prompt"],
        "negative_prompt": fields.get("negative_prompt"),
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }
    made = pipeline.encode_prompt(**asked)
    if len(made) == 2:
        return {"prompt_embeds": _both(made[1], made[0])}
    sides = torch.tensor(
        [[fields["height"], fields["width"], 0, 0, fields["height"], fields["width"]]], dtype=torch.float32
    )
    return {
        "prompt_embeds": _both(made[1], made[0]),
        "add_text_embeds": _both(made[3], made[2]),
        "add_time_ids": _both(sides, sides),
    }


def _both(negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    return torch.cat([negative, positive]).detach()
