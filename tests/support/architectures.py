"""The sampler's parameters of a checkpoint's architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hypergen_sampler.request import Architecture

# A UNet of Stable Diffusion 1.x with classifier-free guidance.
PARAMETERS: Mapping[str, str] = {
    "components": "text_encoder,unet,vae_decoder",
    "text_inputs": json.dumps(
        [
            {
                "encoder": "text_encoder",
                "tokenizer": "tokenizer",
                "inputs": ["input_ids"],
                "outputs": ["encoder_hidden_states"],
                "segment": 0,
                "before": "",
                "after": "",
                "is_instruction": False,
                "max_chunks": 16,
            }
        ]
    ),
    "denoiser": "unet",
    "denoiser_inputs": "encoder_hidden_states",
    "time_width": "320",
    "size_width": "0",
    "flip_sin_to_cos": "1",
    "freq_shift": "0",
    "reverses_time": "0",
    "guidance": "classifier_free",
    "guidance_width": "0",
    "guidance_factor": "1000",
    "is_flow": "0",
    "flow_sigmas": "",
    "flow_shift": "",
    "patch_size": "1",
    "latent_patch_size": "1",
    "encodes_mode": "0",
    "reference_position_step": "0",
    "masked_image_yields": "0",
    "max_reference_rows": "16",
    "token_width": "0",
    "zeros_for_no_negative_prompt": "0",
}


def model_config(parameters: Mapping[str, str | None]) -> str:
    """The configuration that Triton hands over as JSON; a value of None is left out."""
    given = {name: value for name, value in parameters.items() if value is not None}
    return json.dumps({"parameters": {name: {"string_value": value} for name, value in given.items()}})


def architecture_of(**changes: str | None) -> Architecture:
    return Architecture.from_model_config(model_config({**PARAMETERS, **changes}))
