"""The fields of OpenAI's Images API, and HyperGen's own beside them.

Knows names, types, the API's own ranges and what each is for: the one description that requests are validated with and
that /openapi.json publishes. Unknown fields are tolerated, as OpenAI adds some every year.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, WithJsonSchema

from hypergen_gateway.bodies import UploadedFile
from hypergen_gateway.generation import MAX_SEED

MAX_IMAGES = 16

Text = Annotated[str, Field(max_length=32_000)]
Prompt = Annotated[Text, Field(min_length=1, description="What to draw.")]
Upload = Annotated[InstanceOf[UploadedFile], WithJsonSchema({"type": "string", "format": "binary"})]
Uploads = Annotated[
    list[Upload],
    # A form says `image` once for one file and `image[]` again and again for several.
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1, max_length=MAX_IMAGES),
]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class PictureFields(_Body):
    """What every request for pictures may say."""

    model: str | None = Field(default=None, description="Accepted and ignored: the server has one model.")
    n: int = Field(default=1, ge=1, le=10, description="How many pictures.")
    size: str = Field(
        default="auto",
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="`auto`, or WIDTHxHEIGHT. A size that the model does not draw is scaled from the nearest it does, "
        "told in `x-hypergen-drawn-size`; where proportions differ, two sides are cut evenly.",
    )
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] = Field(
        default="auto", description="Half, all or one and a half times the model's own steps."
    )
    response_format: Literal["b64_json", "url"] = Field(
        default="b64_json", description="The pictures themselves, or links to them that expire."
    )
    output_format: Literal["png", "jpeg", "webp"] = Field(default="png", description="The kind of file.")
    output_compression: int = Field(
        default=100,
        ge=0,
        le=100,
        description="For jpeg and webp the encoder's quality: 100 loses least, 0 is smallest.",
    )
    background: Literal["auto", "opaque", "transparent"] = Field(
        default="auto", description="Pictures are opaque; `transparent` is refused."
    )
    user: str | None = Field(default=None, description="Accepted and ignored.")
    safety_identifier: str | None = Field(default=None, description="Accepted and ignored.")
    # HyperGen's own
    negative_prompt: Text | None = Field(default=None, description="What to keep out of the picture.")
    num_inference_steps: int | None = Field(default=None, ge=1, description="Steps of denoising.")
    guidance_scale: float | None = Field(
        default=None, ge=1.0, description="How closely to follow the prompt; 1 is without guidance and half the work."
    )
    guidance_start: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="The share of the steps after which guidance begins, 0 unless given; a step without takes half "
        "the work.",
    )
    guidance_end: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="The share of the steps after which guidance ends, 1 unless given; not before `guidance_start`.",
    )
    cache_interval: int | None = Field(
        default=None,
        ge=1,
        description="Of so many steps only the first computes the UNet's deep features (DeepCache); 1, unless given, "
        "is every step. For models that are served with `--deep-cache`.",
    )
    scheduler: str | None = Field(default=None, description="The sampler's name, such as `euler` or `dpmpp_2m`.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Picture i is drawn from seed + i. Random unless given."
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        description="Refuse at once what would take longer than this many milliseconds, and give up what does.",
    )
    lora_path: str | None = Field(
        default=None, description="The name of a LoRA that the model is served with. Without one: the model as it is."
    )
    lora_scale: float | None = Field(
        default=None, ge=0.0, le=2.0, description="A scale at which that LoRA is served, its first unless given; or 0."
    )


class _PromptFields(PictureFields):
    prompt: Prompt
    stream: bool = Field(default=False, description="Answer with server-sent events.")
    partial_images: int = Field(default=0, ge=0, le=3, description="Previews of each picture in a stream.")
    moderation: Literal["low", "auto"] = Field(default="auto", description="Accepted and ignored.")


class ImageRequest(_PromptFields):
    """The body of POST /v1/images/generations."""

    style: Literal["vivid", "natural"] | None = Field(default=None, description="Accepted and ignored.")


_STRENGTH = Field(
    default=None,
    ge=0.0,
    le=1.0,
    description="How much of the image is given up: 0 keeps it, 1 keeps nothing.",
)


class _EditFields(_PromptFields):
    strength: float | None = _STRENGTH
    input_fidelity: Literal["high", "low"] | None = Field(default=None, description="Accepted and ignored.")


class ImageReference(_Body):
    """An image in a JSON body. OpenAI's other kind of reference, `file_id`, needs its Files API."""

    image_url: str = Field(
        description="A data URL, `data:image/png;base64,…`. No URL is ever fetched.",
        json_schema_extra={"pattern": "^data:"},
    )


class EditRequest(_EditFields):
    """The JSON body of POST /v1/images/edits."""

    images: Annotated[list[ImageReference], Field(min_length=1, max_length=MAX_IMAGES)]
    mask: ImageReference | None = None


class EditForm(_EditFields):
    """The form of POST /v1/images/edits."""

    image: Uploads = Field(
        description="PNG, JPEG or WebP, less than 50 MB each; also as `image[]`. Picture i starts from image i mod k."
    )
    mask: Upload | None = Field(
        default=None, description="A PNG of the first image's size: its transparent pixels are drawn anew."
    )


class VariationForm(PictureFields):
    """The form of POST /v1/images/variations."""

    image: Upload = Field(description="PNG, JPEG or WebP, less than 50 MB.")
    strength: float | None = _STRENGTH

    @property
    def prompt(self) -> str:
        """A variation is drawn from the image alone."""
        return ""

    @property
    def stream(self) -> bool:
        """Variations come all at once."""
        return False

    @property
    def partial_images(self) -> int:
        """Previews are for streams."""
        return 0


PictureRequest: TypeAlias = ImageRequest | EditRequest | EditForm | VariationForm

_INTEGER = re.compile(r"-?[0-9]{1,400}")
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")
_TRUTH = {"true": True, "True": True, "false": False, "False": False}


def from_texts(form: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """A form's texts as the values they stand for, where a field of `kind` is a number or a truth value.

    What is neither stays a text, to be refused as one.
    """
    return {name: _from_text(value, kind, name) if isinstance(value, str) else value for name, value in form.items()}


def _from_text(text: str, kind: type[BaseModel], name: str) -> str | int | float | bool:
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else str
    types = {annotation, *get_args(annotation)}
    if bool in types:
        return _TRUTH.get(text, text)
    if types & {int, float} and _INTEGER.fullmatch(text):
        return int(text)
    if types & {int, float} and _NUMBER.fullmatch(text):
        return float(text)
    return text
