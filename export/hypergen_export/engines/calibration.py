"""Records what a denoiser is called with while its diffusers pipeline generates images, to quantise it with.

The pipeline has the checkpoint's own text encoders, scheduler, steps and guidance scale; its denoiser is the ONNX file
in OpenVINO. Importing this module imports torch and diffusers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypergen_export.checkpoints.checkpoint import Checkpoint
from hypergen_export.checkpoints.components import Component, Sizes
from hypergen_export.checkpoints.defaults import checkpoint_parameters
from hypergen_export.conversion.examples import as_kwargs, example_inputs
from hypergen_export.conversion.loading import load_module, load_placeholders
from hypergen_export.conversion.parity import SHAPES
from hypergen_export.engines.accuracy import Array
from hypergen_export.engines.quantization import Call, Calls, compiled
from hypergen_export.errors import ConversionError, first_line

# For checkpoints that suggest none.
_PROMPTS = (
    "a photo of a lighthouse on a cliff at sunset",
    "portrait of an old fisherman, oil painting",
    "a red fox in a snowy forest, detailed fur",
    "a bowl of fruit on a wooden table, studio light",
    "a busy street in a rainy city at night, neon signs",
    "pencil drawing of a sailing ship",
    "an astronaut riding a horse",
    "a small house with a green roof, flat vector art",
)
# Images that are generated; the calls of the last ones are held out to measure the error with.
IMAGES, HELD_OUT = 8, 2
# Of each image; a longer schedule passes through the same noise levels.
_MOST_STEPS = 10
# A layer's range is known after a few dozen calls, and NNCF reads each several times.
_MOST_CALLS = 40
# UNets' family -> its pipeline that starts from noise, which need not be the one that an index names.
_PIPELINES = {
    "stable-diffusion": "StableDiffusionPipeline",
    "latent-consistency": "LatentConsistencyModelPipeline",
    "stable-diffusion-xl": "StableDiffusionXLPipeline",
    "latent-consistency-xl": "StableDiffusionXLPipeline",
}


def denoiser_calls(checkpoint: Checkpoint, component: Component, onnx: Path, report: Callable[[float], None]) -> Calls:
    """The calls of a UNet over the whole schedule of some images. Seeded: every export records the same.

    Raises ConversionError, BrokenCheckpointError.
    """
    recorder = _Recorder(checkpoint, component, onnx)
    recorded = [recorder.take() for _ in generate(checkpoint, component, recorder.module, report)]
    recorder.close()
    calibration = [call for calls in recorded[:-HELD_OUT] for call in calls]
    held_out = [call for calls in recorded[-HELD_OUT:] for call in calls]
    return Calls(calibration=_spread(calibration), held_out=held_out)


def generate(
    checkpoint: Checkpoint, component: Component, denoiser: torch.nn.Module, report: Callable[[float], None]
) -> Iterator[None]:
    """Generate the latents of `IMAGES` images with a denoiser, over its whole schedule; pauses after each of them.

    Raises ConversionError, BrokenCheckpointError.
    """
    limits = checkpoint_parameters(checkpoint)
    pipeline = _pipeline(checkpoint, denoiser)
    for seed, prompt in enumerate(_prompts(limits["suggestions"])):
        try:
            pipeline(
                prompt,
                num_inference_steps=min(_MOST_STEPS, int(limits["default_num_inference_steps"])),
                width=int(limits["default_width"]),
                height=int(limits["default_height"]),
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
                **_guidance(checkpoint, float(limits["default_guidance_scale"])),
            )
        except Exception as error:  # diffusers documents no errors
            raise ConversionError(f"{component.name}: no image to calibrate with ({first_line(error)})") from error
        report((seed + 1) / IMAGES)
        yield


def _guidance(checkpoint: Checkpoint, scale: float) -> dict[str, Any]:
    """The arguments of the checkpoint's pipeline. Qwen-Image's guides only away from a prompt that is given."""
    if checkpoint.family.name == "qwen-image":
        return {"true_cfg_scale": scale, "negative_prompt": ""}
    return {"guidance_scale": scale}


def example_calls(component: Component, sizes: Sizes) -> Calls:
    """The examples that every export is compared with, for a component of which weights alone are quantised."""
    inputs = (example_inputs(component, sizes, **shape) for shape in SHAPES)
    named = [as_kwargs(component, tensors) for tensors in inputs]
    return Calls(calibration=[], held_out=[{name: each.numpy() for name, each in call.items()} for call in named])


def _prompts(suggestions: str) -> list[str]:
    """So many as there are images, spread over those that the checkpoint suggests."""
    given = suggestions.split("\n") if suggestions else list(_PROMPTS)
    return [given[index * len(given) // IMAGES] for index in range(IMAGES)]


def _spread(calls: list[Call]) -> list[Call]:
    """At most so many calls that their number costs little, evenly over images and steps."""
    count = min(_MOST_CALLS, len(calls))
    return [calls[index * len(calls) // count] for index in range(count)]


def _pipeline(checkpoint: Checkpoint, denoiser: torch.nn.Module) -> Any:
    """The checkpoint's pipeline with this denoiser. The VAE has no weights: latents are not decoded."""
    import diffusers

    components = {component.module: component for component in checkpoint.family.components}
    encoders = {module: load_module(checkpoint, components[module]) for module in checkpoint.text_encoders}
    parts = {
        **encoders,
        **{
            text.tokenizer: _tokenizer(checkpoint, text.tokenizer, text.tokenizer_class)
            for text in checkpoint.family.text
        },
        checkpoint.family.denoiser.module: denoiser,
        "vae": load_placeholders(checkpoint, components["vae"])[0],
    }
    others = {"safety_checker", "feature_extractor", "image_encoder"}
    absent = {name: None for name, part in checkpoint.index.items() if name in others or part == [None, None]}
    name = _PIPELINES.get(checkpoint.family.name) or next(iter(checkpoint.family.pipelines))
    pipeline = getattr(diffusers, name).from_pretrained(checkpoint.folder, **parts, **absent, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer(checkpoint: Checkpoint, name: str, loader: str) -> Any:
    library, _, class_name = loader.partition(".")
    tokenizer = getattr(importlib.import_module(library), class_name)
    return tokenizer.from_pretrained(checkpoint.folder_of(name), local_files_only=True)


class _Recorder:
    """A UNet of diffusers whose `forward` records the component's inputs and runs its ONNX file.

    With guidance a call has two rows, of which one is recorded, by turns: both would take twice as long to calibrate
    with, and add little.
    """

    def __init__(self, checkpoint: Checkpoint, component: Component, onnx: Path) -> None:
        self.module: Any = load_placeholders(checkpoint, component)[0]
        self.module.forward = self._forward
        self._names = [tensor.name for tensor in component.inputs]
        self._engine = compiled(onnx, "bf16")
        self._calls: list[Call] = []
        self._images = 0

    def close(self) -> None:
        """Free the engine with the last reference to this, although the module's `forward` is one, in a circle."""
        del self.module.forward

    def take(self) -> list[Call]:
        """The calls of an image: those since this was called last."""
        calls, self._calls = self._calls, []
        self._images += 1
        return calls

    def _forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        given: dict[str, Any] = {
            "sample": sample,
            "time": self.module.time_proj(timestep.reshape(-1).expand(len(sample))),
            "encoder_hidden_states": encoder_hidden_states,
            "timestep_cond": timestep_cond,
        }
        if added_cond_kwargs:
            sizes = self.module.add_time_proj(added_cond_kwargs["time_ids"].flatten())
            given |= {"text_embeds": added_cond_kwargs["text_embeds"], "size_embeds": sizes.reshape(len(sample), -1)}
        call: dict[str, Array] = {name: np.array(given[name], dtype=np.float32) for name in self._names}
        row = (self._images + len(self._calls)) % len(sample)
        self._calls.append({name: rows[row : row + 1] for name, rows in call.items()})
        return (torch.from_numpy(np.array(self._engine(call)["model_output"])),)
