"""Requests to the model `diffusion`, their validation, and the parameters of `config.pbtxt` that describe the model."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hypergen_sampler.guidance import GUIDANCE
from hypergen_sampler.lora import LORA_SCALES, NO_LORAS, LoraSelection, ServedLora, pool_scales, read_loras
from hypergen_sampler.sinusoids import Sinusoid

Pixels = npt.NDArray[np.uint8]

MAX_SEED = 2**63 - 1
MAX_PARTIAL_IMAGES = 3
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ("default", "karras", "exponential", "beta")
MAX_LORAS = 32
MAX_LORA_SCALE = 10.0


class InvalidInputError(ValueError):
    """An input's value cannot be served. `str()` is "<input>: <problem>"."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")


class NonFiniteError(ArithmeticError):
    """An image's latents or pixels are infinite or NaN, so it would be black. The message is for the client."""


class QueueFullError(RuntimeError):
    """The queue is full. `str()` starts with "queue full"."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits and defaults of this checkpoint and its engines. Sizes are sides in pixels."""

    default_width: int
    default_height: int
    size_factor: int
    min_size: int
    max_size: int
    sizes: tuple[str, ...]
    """WIDTHxHEIGHT of each size that the engines are built for; empty if they accept any size."""
    default_num_inference_steps: int
    max_num_inference_steps: int
    default_guidance_scale: float
    min_guidance_scale: float
    max_guidance_scale: float
    default_image_guidance_scale: float
    max_image_guidance_scale: float
    """0 if the model does not edit by instruction."""
    max_cache_interval: int
    """1 if there is no shallow UNet."""
    max_num_images: int
    max_active_images: int
    max_waiting_images: int
    max_batch_size: int
    """Rows of one denoiser call; an image under classifier-free guidance takes two."""
    latent_channels: int
    vae_scale_factor: int
    max_references: int
    """Reference images of a request; 0 if the denoiser takes none."""
    masked_image_yields: int
    """Whether a masked image is a reference itself only where no other is given."""
    max_reference_pixels: int
    max_reference_side: int
    """Width times height of a reference image, and its longer side."""
    schedulers: tuple[str, ...]
    prompt_weightings: tuple[str, ...]
    """The syntaxes of weights in prompts that a request may select."""
    default_clip_skip: int
    max_clip_skip: int
    """0 if the text encoders have no such input."""
    default_skip_layer_guidance_scale: float
    max_skip_layer_guidance_scale: float
    """0 if the denoiser cannot skip layers, or a call has no room for the third row of an image."""
    loras: tuple[ServedLora, ...]
    """The LoRAs that a request may select; the first scale of a merged one is its default."""
    lora_rank: int
    """Columns of the rank pool; 0 if there is none."""

    @classmethod
    def from_model_config(cls, model_config: str) -> Limits:
        """Read the model configuration that Triton hands over as JSON.

        Raises:
            ValueError: a parameter is missing or not of its type.
        """
        return cls(**_parameters(cls, model_config))


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """How one text encoder reads prompts, and where its outputs go.

    Hidden states of one `segment` are concatenated along the features, segments along the tokens; None: they are not
    used. `before` and `after` are the text around a prompt.
    """

    encoder: str
    tokenizer: str
    """Stored as `NAME.json` beside the model's version folders."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    segment: int | None
    before: str
    after: str
    is_instruction: bool
    """Whether `before` is an instruction, which is not before negative prompts, and all prompts are in lower case."""
    max_chunks: int
    """Longer prompts are encoded in so many chunks, joined along the tokens; what does not fit into them is cut."""

    @property
    def token_inputs(self) -> tuple[str, ...]:
        """The inputs that are made of a prompt's tokens."""
        return tuple(name for name in self.inputs if name != LORA_SCALES)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How this checkpoint's components are combined, which differs between families."""

    components: tuple[str, ...]
    text_inputs: tuple[TextInput, ...]
    denoiser: str
    """The component that takes the steps; `NAME_shallow` takes the steps that reuse deep features."""
    denoiser_inputs: tuple[str, ...]
    """The denoiser's inputs beside `sample` and `time`."""
    time_width: int
    """Length of a timestep's embedding."""
    size_width: int
    """Length of the embedding of one side or offset of an image, 0 if the denoiser has no such input."""
    flip_sin_to_cos: int
    freq_shift: float
    """How diffusers' `Timesteps` embeds timesteps, sides and the guidance scale."""
    reverses_time: int
    """Whether the denoiser is given 1000 minus the timestep."""
    guidance: str
    """A key of `GUIDANCE`."""
    guidance_width: int
    """Length of the guidance scale's embedding, 0 if the denoiser has no such input."""
    guidance_factor: float
    """What the guidance scale is multiplied by before it is embedded."""
    is_flow: int
    """Whether latents flow from noise along straight lines (flow matching)."""
    flow_sigmas: str
    flow_shift: str
    """The arguments of `FlowMatchEuler`."""
    patch_size: int
    """Width and height of the denoiser's tokens in latent pixels."""
    latent_patch_size: int
    """Width and height of a latent pixel in those of the VAE."""
    encodes_mode: int
    """Whether image-to-image starts from the mode of the encoded image instead of a sample."""
    reference_position_step: int
    """The first axis of a reference image's positions: once, twice, … this number."""
    masked_image_yields: int
    """Whether a masked image is a reference itself only where no other is given."""
    max_reference_rows: int
    """Rows of a denoiser call with reference images, which takes more memory than one without."""
    token_width: int
    """Length of a token of a reference image."""
    zeros_for_no_negative_prompt: int
    """An absent negative prompt is encoded as zeros (1) or as the empty text (0). A given one is always encoded."""

    @classmethod
    def from_model_config(cls, model_config: str) -> Architecture:
        """Read the model configuration that Triton hands over as JSON.

        Raises:
            ValueError: a parameter is missing or not of its type.
        """
        return cls(**_parameters(cls, model_config))

    def guides(self, request: Request) -> bool:
        """Whether an image takes two rows of the denoiser, for classifier-free guidance."""
        kind = GUIDANCE[self.guidance]
        return kind.combine is not None and request.guidance_scale > kind.identity

    def check(self, request: Request) -> None:
        """Raise InvalidInputError for options that this checkpoint does not support."""
        if request.skip_layer_guidance_scale and not self.guides(request):
            raise InvalidInputError("skip_layer_guidance_scale", "must be absent or 0 without classifier-free guidance")
        if request.guidance_rescale and self.guidance != "classifier_free":
            raise InvalidInputError("guidance_rescale", "must be absent or 0, as this model is not guided in this way")
        if self.edits_by_instruction and request.image is None:
            raise InvalidInputError("image", "must be given, as this model edits images")
        if GUIDANCE[self.guidance].combine is not None:
            return
        has_interval = (request.guidance_start, request.guidance_end) != (0.0, 1.0)
        if has_interval and self.guidance == "embedded":
            name = "guidance_start" if request.guidance_start else "guidance_end"
            raise InvalidInputError(
                name, "must be absent, as this model's guidance is inside its denoiser and costs nothing"
            )
        if self.guidance == "none" and (request.guidance_scale != 1.0 or has_interval):
            raise InvalidInputError("guidance_scale", "must be absent or 1, as this model takes no guidance")

    def embed_timesteps(self, timesteps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The denoiser's input `time` [R, T] for timesteps [R]."""
        return self._sinusoid(self.time_width)(1000 - timesteps if self.reverses_time else timesteps)

    def image_tokens(self, latent_height: int, latent_width: int) -> int:
        """The tokens of an image with latents of this size, in a transformer."""
        return (latent_height // self.patch_size) * (latent_width // self.patch_size)

    @property
    def guidance_embedding(self) -> Sinusoid:
        """The embedding of the guidance scale, the denoiser's input `guidance`."""
        return self._sinusoid(self.guidance_width)

    @property
    def size_embedding(self) -> Sinusoid:
        """The embedding of sizes in pixels, the denoiser's input `size_embeds`."""
        return self._sinusoid(self.size_width)

    def _sinusoid(self, width: int) -> Sinusoid:
        return Sinusoid(width=width, flip_sin_to_cos=bool(self.flip_sin_to_cos), freq_shift=self.freq_shift)

    @property
    def takes_masked_image(self) -> bool:
        """Whether this is an inpainting model: its UNet is given the mask and the masked image beside the latents."""
        return "masked_image" in self.denoiser_inputs

    @property
    def edits_by_instruction(self) -> bool:
        """Whether the denoiser is given the image to edit, and starts from noise alone."""
        return "image_latents" in self.denoiser_inputs

    @property
    def is_latent_consistency(self) -> bool:
        """Whether diffusers uses its latent consistency pipelines for this checkpoint; it has none for XL."""
        return "timestep_cond" in self.denoiser_inputs and "text_embeds" not in self.denoiser_inputs


def _parameters(cls: type, model_config: str) -> dict[str, Any]:
    """The parameters that are fields of `cls`, converted to the types of the fields."""
    given = {key: entry["string_value"] for key, entry in json.loads(model_config)["parameters"].items()}
    readers: dict[str, Any] = {
        "int": int,
        "float": float,
        "str": str,
        "tuple[str, ...]": _names,
        "tuple[ServedLora, ...]": read_loras,
        "tuple[TextInput, ...]": _text_inputs,
    }
    try:
        return {name: readers[str(kind)](given[name]) for name, kind in cls.__annotations__.items()}
    except KeyError as missing:
        raise ValueError(f"config.pbtxt of diffusion lacks the parameter {missing}") from None


def _text_inputs(text: str) -> tuple[TextInput, ...]:
    try:
        return tuple(
            TextInput(**{**each, "inputs": tuple(each["inputs"]), "outputs": tuple(each["outputs"])})
            for each in json.loads(text)
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.pbtxt of diffusion has an invalid parameter text_inputs ({error})") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A validated request for `num_images` images of one prompt; image i has the seed `seed + i`."""

    prompt: str
    negative_prompt: str | None
    """None if absent, which some families treat differently from an empty one."""
    num_images: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    """A name of `Limits.schedulers`, or empty for the checkpoint's own."""
    seed: int
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    """Guidance applies from `guidance_start` to `guidance_end`, fractions of all steps (Kynkäänniemi et al., 2024)."""
    image_guidance_scale: float = 0.0
    """How closely to keep to the image that is edited by instruction."""
    cache_interval: int = 1
    """Run the full UNet every `cache_interval` steps (DeepCache: Ma et al., 2023)."""
    partial_images: int = 0
    """Number of previews per image."""
    image: Pixels | None = None
    """The input image, [height, width, 3]."""
    mask: Pixels | None = None
    """[height, width], aligned with `image`; 255 is repainted, 0 is kept."""
    references: tuple[Pixels, ...] = ()
    """Images that the denoiser sees beside the one it generates, each [height, width, 3] in a size of its own."""
    strength: float = 1.0
    """How much of `image` is replaced by noise; 1 is all of it. If no step remains, `image` is returned unchanged."""
    timestep_spacing: str = ""
    sigmas: str = ""
    """How the scheduler spaces timesteps and sigmas; empty: as it is configured."""
    eta: float = 0.0
    """DDIM's: 0 is deterministic, 1 is DDPM."""
    guidance_rescale: float = 0.0
    """How much of the guided output's deviation is that of the output for the prompt."""
    skip_layer_guidance_scale: float = 0.0
    """How far to go away from the output of the denoiser without some layers."""
    skip_layer_guidance_start: float = 0.01
    skip_layer_guidance_stop: float = 0.2
    """It applies between these fractions of all steps."""
    prompt_weighting: str = "none"
    """The syntax of weights in both prompts."""
    clip_skip: int = 0
    """So many of CLIP's last layers are left out, as diffusers counts them."""
    loras: LoraSelection = NO_LORAS
    return_latents: bool = False
    """Whether the final latents come with each image."""


def check_request(given: Mapping[str, Any], limits: Limits) -> Request:
    """Validate the given inputs against the limits, and add defaults for absent ones. Keys are tensor names.

    Raises:
        InvalidInputError: names the first invalid input, the problem and the valid values.
    """
    num_images = _within("num_images", given.get("num_images", 1), 1, limits.max_num_images)
    width, height = _size(given, limits)
    _check_pixels(given, width, height)
    given_steps = given.get("num_inference_steps", limits.default_num_inference_steps)
    steps = _within("num_inference_steps", given_steps, 1, limits.max_num_inference_steps)
    guidance_start = _within("guidance_start", given.get("guidance_start", 0.0), 0.0, 1.0)
    guidance_scale = _within(
        "guidance_scale",
        given.get("guidance_scale", limits.default_guidance_scale),
        limits.min_guidance_scale,
        limits.max_guidance_scale,
    )
    return Request(
        prompt=given["prompt"],
        negative_prompt=given.get("negative_prompt"),
        num_images=num_images,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=_image_guidance_scale(given, limits),
        guidance_start=guidance_start,
        guidance_end=_within("guidance_end", given.get("guidance_end", 1.0), guidance_start, 1.0),
        cache_interval=_within("cache_interval", given.get("cache_interval", 1), 1, limits.max_cache_interval),
        scheduler=_one_of("scheduler", given.get("scheduler", ""), ("", *limits.schedulers)),
        seed=_within("seed", given.get("seed", random_seed()), 0, MAX_SEED - num_images + 1),
        partial_images=_within("partial_images", given.get("partial_images", 0), 0, MAX_PARTIAL_IMAGES),
        image=given.get("image"),
        mask=given.get("mask"),
        references=_references(given, limits),
        strength=_strength(given, steps, limits),
        timestep_spacing=_one_of("timestep_spacing", given.get("timestep_spacing", ""), ("", *TIMESTEP_SPACINGS)),
        sigmas=_one_of("sigmas", given.get("sigmas", ""), ("", *SIGMAS)),
        eta=_within("eta", given.get("eta", 0.0), 0.0, 1.0),
        guidance_rescale=_within("guidance_rescale", given.get("guidance_rescale", 0.0), 0.0, 1.0),
        **_skip_layer_guidance(given, limits, guidance_scale),
        prompt_weighting=_one_of("prompt_weighting", given.get("prompt_weighting", "none"), limits.prompt_weightings),
        clip_skip=_within("clip_skip", given.get("clip_skip", limits.default_clip_skip), 0, limits.max_clip_skip),
        loras=_loras(given, limits),
        return_latents=given.get("return_latents", False),
    )


def random_seed() -> int:
    """A random seed of 32 bits: unlikely to occur twice, and short enough to copy by hand."""
    return secrets.randbits(32)


def _within(name: str, value: Any, low: Any, high: Any) -> Any:
    # Written so that NaN is rejected, too, as its comparisons are all false.
    if not low <= value <= high:
        raise InvalidInputError(name, f"must be from {low} to {high}, not {value}")
    return value


def _size(given: Mapping[str, Any], limits: Limits) -> tuple[int, int]:
    """Width and height: the requested ones, else those of the input image, else the checkpoint's default."""
    image = given.get("image")
    default_height, default_width = (limits.default_height, limits.default_width) if image is None else image.shape[:2]
    width = _side("width", given.get("width", default_width), limits)
    height = _side("height", given.get("height", default_height), limits)
    if limits.sizes and f"{width}x{height}" not in limits.sizes:
        raise InvalidInputError("width", f"with height must be one of {', '.join(limits.sizes)}, not {width}x{height}")
    return width, height


def _side(name: str, value: int, limits: Limits) -> int:
    if value % limits.size_factor or not limits.min_size <= value <= limits.max_size:
        legal = f"a multiple of {limits.size_factor} from {limits.min_size} to {limits.max_size}"
        raise InvalidInputError(name, f"must be {legal}, not {value}")
    return value


def _check_pixels(given: Mapping[str, Any], width: int, height: int) -> None:
    for name, shape in (("image", (height, width, 3)), ("mask", (height, width))):
        if name in given and "image" not in given:
            raise InvalidInputError(name, "needs an image that it lies over")
        if name in given and given[name].shape != shape:
            problem = f"must be {list(shape)} as height and width say, not {list(given[name].shape)}"
            raise InvalidInputError(name, problem)


def _references(given: Mapping[str, Any], limits: Limits) -> tuple[Pixels, ...]:
    if "references" not in given and "reference_sizes" not in given:
        return ()
    pixels, sizes = given.get("references", np.empty(0, np.uint8)), given.get("reference_sizes", np.empty((0, 2)))
    # A masked image may itself be the first reference.
    room = limits.max_references - ("mask" in given and not limits.masked_image_yields)
    if not 0 < len(sizes) <= room:
        legal = f"of 1 to {room} images" if room > 0 else "absent, as this model takes none"
        raise InvalidInputError("references", f"must be {legal}, not {len(sizes)}")
    shapes = [_reference_shape(height, width, limits) for height, width in sizes.tolist()]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    if ends[-1] != len(pixels):
        raise InvalidInputError("references", f"must have {ends[-1]} bytes as their sizes say, not {len(pixels)}")
    return tuple(part.reshape(shape) for part, shape in zip(np.split(pixels, ends[:-1]), shapes, strict=True))


def _reference_shape(height: int, width: int, limits: Limits) -> tuple[int, int, int]:
    factor, longest, most = limits.size_factor, limits.max_reference_side, limits.max_reference_pixels
    if any(side % factor or not 0 < side <= longest for side in (height, width)) or height * width > most:
        legal = f"multiples of {factor} up to {longest}, and {most} in product"
        raise InvalidInputError("reference_sizes", f"must be {legal}, not {height} and {width}")
    return height, width, 3


def _image_guidance_scale(given: Mapping[str, Any], limits: Limits) -> float:
    scale = given.get("image_guidance_scale")
    if scale is None:
        return limits.default_image_guidance_scale
    if not limits.max_image_guidance_scale:
        raise InvalidInputError("image_guidance_scale", "must be absent, as this model does not edit by instruction")
    within: float = _within("image_guidance_scale", scale, 1.0, limits.max_image_guidance_scale)
    return within


def _strength(given: Mapping[str, Any], steps: int, limits: Limits) -> float:
    """The strength; by default 0.8 but at least one step, or 1 with a mask, as in diffusers' pipelines."""
    if "strength" in given and "image" not in given:
        raise InvalidInputError("strength", "needs an image to start from")
    if "strength" in given and limits.max_image_guidance_scale:
        raise InvalidInputError("strength", "must be absent, as this model edits by instruction, from noise alone")
    unasked = max(0.8, 1 / steps) if "image" in given and "mask" not in given else 1.0
    strength: float = _within("strength", given.get("strength", unasked), 0.0, 1.0)
    return strength


def _skip_layer_guidance(given: Mapping[str, Any], limits: Limits, guidance_scale: float) -> dict[str, float]:
    """Scale, start and stop of skip-layer guidance, with the interval of StableDiffusion3Pipeline by default."""
    scale, start, stop = (f"skip_layer_guidance_{name}" for name in ("scale", "start", "stop"))
    most = limits.max_skip_layer_guidance_scale
    default = limits.default_skip_layer_guidance_scale if guidance_scale > limits.min_guidance_scale else 0.0
    for name in (scale, start, stop):
        if not most and given.get(name):
            raise InvalidInputError(name, "must be absent or 0, as this model has no skip-layer guidance")
    if not most:
        return {}
    first = _within(start, given.get(start, 0.01), 0.0, 1.0)
    return {
        scale: _within(scale, given.get(scale, default), 0.0, most),
        start: first,
        stop: _within(stop, given.get(stop, 0.2), first, 1.0),
    }


def _loras(given: Mapping[str, Any], limits: Limits) -> LoraSelection:
    """The requested LoRAs, at their default scales if none are given; at a scale of 0 a LoRA changes nothing."""
    names = given.get("lora", [])
    if len(names) > MAX_LORAS:
        raise InvalidInputError("lora", f"must be at most {MAX_LORAS}, not {len(names)}")
    scales = given.get("lora_scale", [None] * len(names))
    if len(scales) != len(names):
        problem = f"must have a value for each LoRA, not {len(scales)} for {len(names)}" if names else "needs a lora"
        raise InvalidInputError("lora_scale", problem)
    chosen = [_lora(name, scale, limits) for name, scale in zip(names, scales, strict=True)]
    merged = [lora for lora, scale in chosen if scale and not lora.columns]
    if len(merged) > 1:
        together = " and ".join(lora.name[:64] for lora in merged)
        raise InvalidInputError("lora", f"must not combine {together}: each is merged into the weights by itself")
    pooled = [(lora, scale) for lora, scale in chosen if lora.columns]
    return LoraSelection(scales=pool_scales(limits.lora_rank, pooled), models=merged[0].models if merged else {})


def _lora(name: str, scale: float | None, limits: Limits) -> tuple[ServedLora, float]:
    """The LoRA of a name, and its scale."""
    known = [lora for lora in limits.loras if lora.name == name]
    if not known:
        names = ", ".join(dict.fromkeys(lora.name for lora in limits.loras))
        legal = f"one of {names}" if names else "absent, as this model has none"
        raise InvalidInputError("lora", f"must be {legal}, not {name[:64]!r}")
    if scale is None:
        return known[0], known[0].scale
    if known[0].columns:
        return known[0], _within("lora_scale", scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
    found = next((lora for lora in known if scale in (lora.scale, 0)), None)
    if found is None:
        legal = ", ".join(f"{one:g}" for one in sorted({0.0, *(lora.scale for lora in known)}))
        raise InvalidInputError("lora_scale", f"must be {legal}, not {scale:g}")
    return found, scale


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InvalidInputError(name, f"must be one of {', '.join(filter(None, known))}, not {value[:64]!r}")
    return value
