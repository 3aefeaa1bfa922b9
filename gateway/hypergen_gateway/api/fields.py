"""The request fields of OpenAI's Images API, and HyperGen's extensions.

Names, types, descriptions and the API's own ranges are defined once, for validation and for /openapi.json. Unknown
fields are ignored, as OpenAI adds some every year.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, WithJsonSchema
from pydantic.fields import FieldInfo

from hypergen_gateway.api.bodies import UploadedFile
from hypergen_gateway.generation.backend import MAX_SEED
from hypergen_gateway.storage.lora_files import NAME

MAX_IMAGES = 16
MAX_LORAS = 32
MAX_DEADLINE_MS = 2**31 - 1
# Above this, a float no longer has all the digits that the client wrote.
_EXACT = 2**53


def _whole(value: object) -> object:
    """Converts floats such as 1.0, which JSON Schema counts as integers."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value


def _listed(value: object) -> object:
    """Wraps a single image in a list: a form has `image` once for one file, and repeats `image[]` for several."""
    return value if isinstance(value, list) else [value]


def _reference(value: object) -> object:
    """The URL or base64 text in an object that refers to an image; a text is returned as it is."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("image_url", "url", "b64_json") if value.get(key) is not None), value)
    return value["url"] if isinstance(value, dict) and "url" in value else value


@dataclass(frozen=True)
class Legal:
    """The legal values of a field, to complete "It must be …", if its type and range do not say it all.

    Placeholders in braces are filled in from the model's description and the policies.
    """

    text: str


@dataclass(frozen=True)
class ModelLimit:
    """The upper bound of a field, and its lower one if the model has one, as names of fields of `ModelDescription`."""

    name: str
    lower: str | None = None


_WHOLE = BeforeValidator(_whole)
_IMAGE = Legal("a PNG, JPEG, WebP, AVIF or GIF file; an edit takes up to {max_images}")
_MASK = Legal('a PNG, transparent where the image is regenerated; in JSON {{"image_url": "data:image/png;base64,…"}}')
Text = Annotated[str, Field(max_length=32_000), Legal("a string of at most 32,000 characters")]
Prompt = Annotated[
    str,
    Field(min_length=1, max_length=32_000, description="A description of the image."),
    Legal("a string of 1 to 32,000 characters"),
]
Upload = Annotated[InstanceOf[UploadedFile], WithJsonSchema({"type": "string", "format": "binary"})]
Uploads = Annotated[list[Upload], BeforeValidator(_listed), Field(min_length=1, max_length=MAX_IMAGES)]

_TEXT_SCHEMA: dict[str, Any] = {"type": "string"}


def _holding(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: value}, "required": [key]}


# OpenAI's other kind of reference, `file_id`, needs its Files API.
ImageReference = Annotated[
    str,
    BeforeValidator(_reference),
    WithJsonSchema(
        {
            "anyOf": [
                _holding("image_url", {"anyOf": [_TEXT_SCHEMA, _holding("url", _TEXT_SCHEMA)]}),
                _holding("url", _TEXT_SCHEMA),
                _holding("b64_json", _TEXT_SCHEMA),
                _TEXT_SCHEMA,
            ]
        }
    ),
]
References = Annotated[list[ImageReference], BeforeValidator(_listed), Field(min_length=1, max_length=MAX_IMAGES)]


_INTERVALS = Legal("{legal_cache_intervals}")
_SKIPS = Legal("{legal_clip_skips}")
_IMAGE_SCALES = Legal("{legal_image_guidance_scales}")
_LORAS = Legal(
    f'a list of at most {MAX_LORAS} objects such as {{{{"name": "ink", "scale": 0.8}}}}, with scales from -10 to 10 '
    "and names of {offered_loras}"
)
_SKIP_SCALES = Legal("{legal_skip_layer_guidance_scales}")
_SKIP_STARTS = Legal("{legal_skip_layer_guidance_starts}")
_SKIP_STOPS = Legal("{legal_skip_layer_guidance_stops}")
_NEGATIVE = Legal("{legal_negative_prompts}")
_SCALES = Legal("{legal_guidance_scales}")
_STRENGTHS = Legal("{legal_strengths}")
_SEEDS = Legal(f"an integer from 0 to {MAX_SEED}, and so must be seed + n - 1; -1 is a random one")


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


LoraScale = Annotated[float | None, Field(ge=-10.0, le=10.0)]


class LoraReference(BaseModel):
    """A LoRA that the server offers, and its scale."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    scale: LoraScale = None


class ImageFields(_Body):
    """Fields of every request for images."""

    model: str | None = Field(default=None, description="Accepted and ignored: the server has one model.")
    n: Annotated[int, Field(ge=1, le=10), _WHOLE, ModelLimit("max_num_images")] = Field(
        default=1, description="The number of images."
    )
    size: Annotated[str, Legal("'auto' or {legal_sizes}")] = Field(
        default="auto",
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="`auto`, or WIDTHxHEIGHT. A size that the model does not generate is scaled from the nearest one "
        "that it does, given in `x-hypergen-generated-size`; if the aspect ratios differ, two sides are cropped "
        "evenly.",
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] = Field(
        default="auto",
        description="Scales the model's default number of steps: by 0.5 (`low`), 1, or 1.5 (`high` and above).",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None,
        description="The images themselves, or expiring links to them. The default is `b64_json`; it is `url` if "
        "`stream` is not set and `model` is `dall-e-2` or `dall-e-3`, or a variation has no `model`.",
    )
    output_format: Literal["png", "jpeg", "webp"] = Field(default="png", description="The file format.")
    output_compression: Annotated[int, Field(ge=0, le=100), _WHOLE] = Field(
        default=100,
        description="The encoder's quality for `jpeg` and `webp`: 100 is the best, 0 the smallest file.",
    )
    background: Annotated[Literal["auto", "opaque", "transparent"], Legal("'auto' or 'opaque'")] = Field(
        default="auto", description="Images are opaque; `transparent` is rejected."
    )
    user: str | None = Field(default=None, description="Accepted and ignored.")
    safety_identifier: str | None = Field(default=None, description="Accepted and ignored.")
    # HyperGen's extensions
    negative_prompt: Annotated[Text | None, _NEGATIVE] = Field(
        default=None, description="A description of what the image should not show; some models have none."
    )
    num_inference_steps: Annotated[int, Field(ge=1), _WHOLE, ModelLimit("max_num_inference_steps")] | None = Field(
        default=None, description="The number of denoising steps."
    )
    guidance_scale: Annotated[float | None, ModelLimit("max_guidance_scale", "min_guidance_scale"), _SCALES] = Field(
        default=None,
        ge=0.0,
        description="How closely to follow the prompt. The lowest value, 1 for most models, disables guidance, which "
        "halves the work, unless the model is given the scale itself.",
    )
    image_guidance_scale: Annotated[float | None, ModelLimit("max_image_guidance_scale"), _IMAGE_SCALES] = Field(
        default=None,
        ge=1.0,
        description="How closely an edit keeps to the input image, for models that edit by instruction; by default the "
        "model's own, usually 1.5.",
    )
    guidance_start: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="The fraction of the steps after which guidance begins; 0 by default. A step without guidance is "
        "half the work.",
    )
    guidance_end: Annotated[float | None, Legal("a number from 'guidance_start' to 1")] = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="The fraction of the steps after which guidance ends; 1 by default, at least `guidance_start`.",
    )
    cache_interval: Annotated[int, Field(ge=1), _WHOLE, ModelLimit("max_cache_interval"), _INTERVALS] | None = Field(
        default=None,
        description="Run the full UNet every N steps and reuse its deep features in between (DeepCache); 1, the "
        "default, runs it in every step. For models that are served with `--deep-cache`.",
    )
    prompt_weighting: Annotated[str | None, Legal("{legal_prompt_weightings}")] = Field(
        default=None,
        description="The syntax of weights in both prompts: `none` takes them as plain text; `a1111` reads "
        "`(word:1.3)`, `((word))`, `[word]` and `BREAK` as stable-diffusion-webui does, `compel` `word++` and "
        "`(a few words)1.3` as compel does. The default is the server's, usually `none`.",
    )
    clip_skip: Annotated[int, Field(ge=0), _WHOLE, ModelLimit("max_clip_skip"), _SKIPS] | None = Field(
        default=None,
        description="How many of CLIP's last layers are left out, counted as in diffusers: stable-diffusion-webui's "
        "clip skip is one more for 1.x and 2.x. The default is the checkpoint's or the server's, usually 0.",
    )
    scheduler: Annotated[str | None, Legal("one of {known_schedulers}")] = Field(
        default=None,
        description="The scheduler, such as `euler` or `dpmpp_2m`, or its name in stable-diffusion-webui, such as "
        "`DPM++ 2M Karras`; by default the model's own.",
    )
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        default=None, description="How the scheduler spaces timesteps; by default as the model is configured."
    )
    sigmas: Literal["default", "karras", "exponential", "beta"] | None = Field(
        default=None, description="How the scheduler spaces noise levels; `default` is the scheduler's own way."
    )
    eta: float | None = Field(
        default=None, ge=0.0, le=1.0, description="DDIM's share of new noise in every step: 0, the default, is none."
    )
    guidance_rescale: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Corrects overexposure by strong guidance: how much of the guided output's deviation is that "
        "of the output for the prompt alone. 0 by default.",
    )
    skip_layer_guidance_scale: Annotated[float | None, ModelLimit("max_skip_layer_guidance_scale"), _SKIP_SCALES] = (
        Field(
            default=None,
            ge=0.0,
            description="Skip-layer guidance, which improves structure and anatomy: how far to go away from the output "
            "without some of the denoiser's layers. 0, the usual default, is without it; a step with it takes half as "
            "much work again. For models such as Stable Diffusion 3.5 Medium, whose authors advise 2.5 to 2.8.",
        )
    )
    skip_layer_guidance_start: Annotated[float | None, _SKIP_STARTS] = Field(
        default=None, ge=0.0, le=1.0, description="The fraction of the steps after which it begins; 0.01 by default."
    )
    skip_layer_guidance_stop: Annotated[float | None, _SKIP_STOPS] = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="The fraction of the steps before which it ends; 0.2 by default, at least "
        "`skip_layer_guidance_start`.",
    )
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED), _WHOLE, _SEEDS] | None = Field(
        default=None, description="Image i is generated from seed + i. Random by default, or if it is -1."
    )
    deadline_ms: Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS), _WHOLE] | None = Field(
        default=None,
        description="Reject the request at once if it is expected to take longer than this many milliseconds, and "
        "cancel it if it does.",
    )
    lora_path: Annotated[str | None, Legal("{known_loras}")] = Field(
        default=None, description="The name of a LoRA that the server offers; by default none."
    )
    lora_scale: LoraScale = Field(
        default=None,
        description="That LoRA's scale, by default the one it is served with; 0 disables it, and negative ones "
        "subtract it. A LoRA that is merged into the weights has certain scales only: see `/v1/capabilities`.",
    )
    loras: Annotated[list[LoraReference], _LORAS] = Field(
        default_factory=list,
        max_length=MAX_LORAS,
        description='LoRAs with their scales, such as `[{"name": "ink", "scale": 0.8}]`, beside `lora_path`. '
        "Scales are as `lora_scale`; those of one LoRA are added.",
    )


class _PromptFields(ImageFields):
    prompt: Prompt
    stream: bool = Field(default=False, description="Respond with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3), _WHOLE] = Field(
        default=0, description="The number of previews of each image in a stream."
    )
    moderation: Literal["low", "auto"] = Field(default="auto", description="Accepted and ignored.")


class ImageRequest(_PromptFields):
    """The body of POST /v1/images/generations."""

    style: Literal["vivid", "natural"] | None = Field(default=None, description="Accepted and ignored.")


_STRENGTH = Field(
    default=None,
    ge=0.0,
    le=1.0,
    description="How much of the input image is replaced: 1 keeps nothing; 0, or so little that no step is left, "
    "returns it unchanged. Without it, a model that takes references (`max_references` of `/v1/capabilities`) is shown "
    "the images of an edit as such, and generates from noise.",
)


class _EditFields(_PromptFields):
    strength: Annotated[float | None, _STRENGTHS] = _STRENGTH
    input_fidelity: Literal["high", "low"] | None = Field(default=None, description="Accepted and ignored.")


_IMAGE_REFERENCES = Legal(
    '1 to {max_images} images, each an object such as {{"image_url": "data:image/png;base64,…"}}; '
    "a file_id would need OpenAI's Files API"
)


class EditRequest(_EditFields):
    """The JSON body of POST /v1/images/edits."""

    images: Annotated[References, _IMAGE_REFERENCES] = Field(
        validation_alias=AliasChoices("images", "image"),
        description="Data URLs, `data:image/png;base64,…`, or base64; also as `image`. URLs are never fetched.",
    )
    mask: Annotated[ImageReference | None, _MASK] = None


class EditForm(_EditFields):
    """The form of POST /v1/images/edits."""

    image: Annotated[Uploads, _IMAGE] = Field(
        validation_alias=AliasChoices("image", "images"),
        description="PNG, JPEG, WebP, AVIF or GIF, less than 50 MB each; also as `image[]`. Image i starts from "
        "input image i mod k, unless the model takes all of them as references.",
    )
    mask: Annotated[Upload | None, _MASK] = Field(
        default=None, description="A PNG of the first image's size: its transparent pixels are regenerated."
    )


class VariationForm(ImageFields):
    """The form of POST /v1/images/variations."""

    image: Annotated[Upload, _IMAGE] = Field(
        validation_alias=AliasChoices("image", "images"), description="PNG, JPEG, WebP, AVIF or GIF, less than 50 MB."
    )
    strength: Annotated[float | None, _STRENGTHS] = _STRENGTH
    stream: bool = Field(default=False, description="Variations cannot be streamed; `true` is rejected.")

    @property
    def prompt(self) -> str:
        """Empty: a variation is generated from the image alone."""
        return ""

    @property
    def partial_images(self) -> int:
        """Zero: only streams have previews."""
        return 0


class LoraForm(BaseModel):
    """The form of POST /v1/loras."""

    name: str = Field(
        pattern=f"^{NAME.pattern}$", description="The name for requests. A file that has it already is replaced."
    )
    file: Upload = Field(description="A LoRA in the format safetensors.")


RequestBody: TypeAlias = ImageRequest | EditRequest | EditForm | VariationForm

_INTEGER = re.compile(r"-?[0-9]{1,400}")
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")
_TRUTH = {"true": True, "True": True, "false": False, "False": False}


def from_texts(form: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Converts a form's texts to numbers and booleans for the fields that `kind` declares as such.

    A text that cannot be converted is kept, for validation to reject.
    """
    return {name: _from_text(value, kind, name) if isinstance(value, str) else value for name, value in form.items()}


def _from_text(text: str, kind: type[BaseModel], name: str) -> Any:
    types = set(_types(kind.model_fields[name].annotation)) if name in kind.model_fields else set()
    if LoraReference in types:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    if bool in types:
        return _TRUTH.get(text, text)
    if types & {int, float} and _INTEGER.fullmatch(text):
        return int(text)
    if types & {int, float} and _NUMBER.fullmatch(text):
        return float(text)
    return text


def _types(annotation: Any) -> Iterator[Any]:
    """Yields an annotation and everything nested in it, including metadata."""
    yield annotation
    if isinstance(annotation, FieldInfo):
        yield from annotation.metadata
    for part in get_args(annotation):
        yield from _types(part)


def legal_values(kind: type[BaseModel], name: str) -> str:
    """The legal values of a field, with placeholders as in `Legal`."""
    parts = _parts(kind, name)
    for legal in (part for part in parts if isinstance(part, Legal)):
        return legal.text
    for literal in (part for part in parts if get_origin(part) is Literal):
        *others, last = map(repr, get_args(literal))
        return f"{', '.join(others)} or {last}"
    if bool in parts:
        return "true or false"
    if str in parts:
        return "a string"
    low = next(part.ge for part in parts if isinstance(part, Ge))
    limit = model_limit(kind, name)
    high = None if limit else next(part.le for part in parts if isinstance(part, Le))
    if int in parts:
        return f"an integer from {low} to {f'{{{limit.name}}}' if limit else high}"
    return f"a number from {low:g} to {high:g}"


def model_limit(kind: type[BaseModel], name: str) -> ModelLimit | None:
    """A field's bounds in the `ModelDescription`, if the model has them."""
    return next((part for part in _parts(kind, name) if isinstance(part, ModelLimit)), None)


def _parts(kind: type[BaseModel], name: str) -> list[Any]:
    field = kind.model_fields[name]
    return [*field.metadata, *_types(field.annotation)]
