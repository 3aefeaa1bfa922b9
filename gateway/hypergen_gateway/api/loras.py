"""The LoRAs of a request: `lora_path` with `lora_scale`, `loras`, and those that its prompt names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypergen_gateway.api.fields import MAX_LORAS, LoraReference, RequestBody, VariationForm
from hypergen_gateway.api.validation import invalid
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.backend import Lora, ModelDescription

# As in Stable Diffusion web UIs: <lora:NAME> or <lora:NAME:SCALE>.
_TAG = re.compile(r"<lora:([^<>:]*)(?::([^<>]*))?>")
_SCALE = re.compile(r"\s*[+-]?(\d{1,9}\.?\d{0,9}|\.\d{1,9})\s*")
_LARGEST_SCALE = 10.0


@dataclass(frozen=True)
class _Named:
    """A LoRA that a request names, and the fields that it stands in."""

    name: str
    scale: float | None
    field: str
    scale_field: str


def with_prompt_loras(body: RequestBody) -> RequestBody:
    """The request with the LoRAs that its prompt names moved to `loras`: `a fox <lora:ink:0.8>`.

    Raises:
        InvalidRequestError: a scale is not a number from -10 to 10, or there are too many LoRAs.
    """
    if isinstance(body, VariationForm) or not (tags := list(_TAG.finditer(body.prompt))):
        return body
    loras = [*body.loras, *(_read_tag(tag) for tag in tags)]
    if len(loras) > MAX_LORAS:
        raise InvalidRequestError(f"Invalid value for 'prompt': it names more than {MAX_LORAS} LoRAs.", "prompt")
    return body.model_copy(update={"prompt": _TAG.sub("", body.prompt).strip(), "loras": loras})


def _read_tag(tag: re.Match[str]) -> LoraReference:
    name, scale = tag[1].strip(), tag[2]
    if scale is None:
        return LoraReference(name=name)
    if not _SCALE.fullmatch(scale) or abs(float(scale)) > _LARGEST_SCALE:
        raise InvalidRequestError(
            f"Invalid value for 'prompt': {tag[0][:80]}. The scale of <lora:NAME:SCALE> must be a number from "
            f"{-_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}.",
            "prompt",
        )
    return LoraReference(name=name, scale=float(scale))


def requested_loras(body: RequestBody, model: ModelDescription) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and scales of the LoRAs that change something, in the order of the request.

    A scale without a LoRA is ignored, and a LoRA at a scale of 0.

    Raises:
        InvalidRequestError: a LoRA is not served, not at that scale, or not together with another, or they are too
            many.
    """
    chosen = [(named, *_find(named, body, model)) for named in _named(body)]
    effective = [(named, lora, scale) for named, lora, scale in chosen if scale]
    if len(effective) > MAX_LORAS:
        raise InvalidRequestError(
            f"Invalid value for 'loras': with 'lora_path', the request has {len(effective)} LoRAs, and at most "
            f"{MAX_LORAS} are possible.",
            "loras",
        )
    _check_merged([(named, lora) for named, lora, _ in effective if lora.is_merged])
    return tuple(lora.name for _, lora, _ in effective), tuple(scale for _, _, scale in effective)


def _named(body: RequestBody) -> Iterator[_Named]:
    if body.lora_path is not None:
        yield _Named(body.lora_path, body.lora_scale, "lora_path", "lora_scale")
    for lora in body.loras:
        yield _Named(lora.name, lora.scale, "loras", "loras")


def _find(named: _Named, body: RequestBody, model: ModelDescription) -> tuple[Lora, float]:
    """The served LoRA, and the scale at which it is requested."""
    known = [lora for lora in model.loras if lora.name == named.name]
    if not known:
        raise invalid(named.field, {named.field: named.name}, model, type(body))
    scale = known[0].scale if named.scale is None else named.scale
    if known[0].is_merged and scale not in (0, *(lora.scale for lora in known)):
        scales = ", ".join(f"{lora.scale:g}" for lora in known)
        raise InvalidRequestError(
            f"Invalid value for '{named.scale_field}': {scale:g}. '{named.name}' is served at {scales}; 0 disables it.",
            named.scale_field,
        )
    return known[0], scale


def _check_merged(merged: Sequence[tuple[_Named, Lora]]) -> None:
    if len(merged) > 1:
        (_, first), (named, second) = merged[:2]
        raise InvalidRequestError(
            f"Invalid value for '{named.field}': {second.name!r} cannot be combined with {first.name!r}, as each "
            "of them is merged into a copy of the model.",
            named.field,
        )
