"""What a model family is: its components, how prompts become conditioning, and how its latents are sampled, as data.

The families themselves are in `families`. Does not import torch; loading and conversion are in other modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hypergen_export.checkpoints.components import Component, Sizes
from hypergen_export.checkpoints.lora import T5

Config = Mapping[str, Any]

CLIP_TOKENIZER = "transformers.CLIPTokenizer"


@dataclass(frozen=True, kw_only=True)
class ConfigOverrides:
    """Changes that a pipeline's constructor makes in the configs that it loads; absent entries stay absent.

    `scheduler` applies to the scheduler's config, `inpainting` also, in the inpainting pipeline. A UNet saved by
    diffusers before 0.9 has a `sample_size` of at least `min_legacy_sample_size`: older versions stated it wrongly.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    inpainting: Mapping[str, Any] = field(default_factory=dict)
    min_legacy_sample_size: int = 0


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """How one text encoder reads a prompt, and where its hidden states go.

    `encoder` names the component, `tokenizer` the checkpoint's subfolder and `tokenizer_class` its class. `tokens` is
    the size that limits its length.

    The denoiser's hidden states are segments in a row: encoders of one `segment` are concatenated along the features,
    segments along the tokens, narrower ones padded with zeros. Without a segment only the pooled output is used.

    `max_chunks`: a longer prompt is encoded in so many chunks of that length, joined along the tokens; the rest is cut.

    `template` is the text around the prompt, which replaces its "{}"; `chat` are arguments of the tokenizer's chat
    template, rendered with the prompt as the user's message. At most one of them is given. `is_instruction`: the
    template is an instruction, which is not before negative prompts, and all prompts are in lower case.
    """

    encoder: str
    tokenizer: str = "tokenizer"
    tokenizer_class: str = CLIP_TOKENIZER
    tokens: str = "tokens"
    segment: int | None = 0
    max_chunks: int = 1
    template: str = "{}"
    chat: Mapping[str, Any] | None = None
    is_instruction: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the sampler treats this family's latents; the values are those of its parameters.

    `guidance` is one of the sampler's kinds. `is_flow`: latents flow from noise along straight lines (flow matching);
    `flow_sigmas` and `flow_shift` are then how diffusers' pipeline calls `set_timesteps`. `patch_size`: a token of the
    denoiser is so many latent pixels wide and high. `latent_patch_size`: a latent pixel of the sampler is so many of
    the VAE's wide and high. `reverses_time`: the denoiser is given 1000 minus the timestep. `encodes_mode`: an input
    image starts from the mode of the VAE's posterior instead of a sample.
    """

    guidance: str = "classifier_free"
    is_flow: bool = False
    flow_sigmas: str = ""
    flow_shift: str = ""
    patch_size: int = 1
    latent_patch_size: int = 1
    reverses_time: bool = False
    encodes_mode: bool = False


@dataclass(frozen=True, kw_only=True)
class References:
    """Reference images, whose tokens the denoiser is given beside those of the image that it generates.

    A request may have up to `count`. Each has at most `pixels`, or one of `sizes` (WIDTHxHEIGHT), that with the nearest
    ratio. On the first axis of positions, they are at once, twice, … `position_step`. A masked image is a reference,
    too: the first one, or if it `yields`, only where no other is given.
    """

    count: int
    pixels: int
    sizes: tuple[str, ...] = ()
    position_step: int
    yields: bool = False


class Configs(Protocol):
    """Read access to a checkpoint's configs."""

    def config(self, module: str) -> Config:
        """The config.json of a module."""
        ...

    def tokenizer_length(self, tokenizer: str) -> int | None:
        """The length that a tokenizer's config states, if any."""
        ...

    def token_count(self, tokenizer: str, text: str) -> int:
        """The tokens of a text, without those that a tokenizer adds."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints that are served by the same components.

    `pipelines` maps diffusers' class names to the config overrides of each. Families that share a pipeline differ in
    the denoiser's inputs, which `stated_inputs` reads from its config, or in the index (`is_named_by`). `read_sizes`
    reads the sizes that axes refer to; `check` yields the reasons why a checkpoint's configs are not supported.
    `text` is how prompts are encoded, in the order of the denoiser's hidden states.

    `num_inference_steps` and `guidance_scale` are the defaults of diffusers' pipeline or of the published checkpoint's
    card, for checkpoints that are not distilled. `read_card` returns those of checkpoints with another card, told by
    the denoiser's config and the checkpoint's names. `distilled_steps` are the steps of distilled checkpoints whose
    names do not say them. `default_side` is
    that of images in pixels, 0 if the denoiser's config states it. `accepted_classes` are further classes that an
    index may name for a module. `references` if the denoiser takes reference images. `vae_levels` reads from the VAE's
    config on how many sizes it works, each half of the one before.
    """

    name: str
    pipelines: Mapping[str, ConfigOverrides]
    components: tuple[Component, ...]
    text: tuple[TextInput, ...]
    stated_inputs: Callable[[Config], set[str]]
    read_sizes: Callable[[Configs], Sizes]
    check: Callable[[Mapping[str, Config], Sizes], Iterable[str]]
    num_inference_steps: int
    guidance_scale: float
    distilled_steps: int = 4
    read_card: Callable[[Config, str], tuple[int, float] | None] = lambda _config, _names: None
    sampling: Sampling = Sampling()
    references: References | None = None
    default_side: int = 0
    is_named_by: Callable[[Config], bool] = lambda _: True
    vae_levels: Callable[[Config], int] = lambda vae: len(vae["block_out_channels"])
    accepted_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, str]:
        """Subfolder of the checkpoint -> its class."""
        return {component.module: component.loader for component in self.components}

    @property
    def t5(self) -> str:
        """The module that is a T5, if there is one."""
        return next((module for module, loader in self.modules.items() if loader == "transformers.T5EncoderModel"), T5)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers' subfolders, one for each text encoder."""
        return tuple(each.tokenizer for each in self.text)

    @property
    def guided_rows(self) -> int:
        """The most rows of a denoiser call that an image takes."""
        return 3 if self.sampling.guidance == "classifier_free_with_image" else 2

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The text encoders, in the order of `text`."""
        by_name = {component.name: component for component in self.components}
        return tuple(by_name[each.encoder] for each in self.text)

    @property
    def denoiser(self) -> Component:
        """The component that takes the steps, named after the checkpoint's subfolder: `unet` or `transformer`."""
        (denoiser,) = (component for component in self.components if component.is_denoiser)
        return denoiser

    @property
    def denoiser_inputs(self) -> tuple[str, ...]:
        """The denoiser's inputs beside latents and timestep."""
        return tuple(tensor.name for tensor in self.denoiser.inputs if tensor.name not in ("sample", "time"))
