"""The API's OpenAPI 3.1 document, published at /openapi.json and rendered at /docs.

Fields, types and ranges come from the pydantic models of requests and responses, and the served model's defaults and
limits from its `ModelDescription`. This module adds the routes and the description of each error status.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from hypergen_gateway.api.capabilities import Capabilities
from hypergen_gateway.api.fields import (
    EditForm,
    EditRequest,
    ImageFields,
    ImageRequest,
    LoraForm,
    VariationForm,
    model_limit,
)
from hypergen_gateway.api.responses import (
    CompletedEvent,
    DeletedLora,
    Health,
    ImagesResponse,
    LoraList,
    LoraObject,
    ModelList,
    ModelObject,
    PartialImageEvent,
)
from hypergen_gateway.generation.backend import ModelDescription
from hypergen_gateway.storage.local import FILES_PATH

JsonObject = dict[str, Any]


class ErrorObject(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None = Field(description="The field that is wrong, if it is one.")
    code: str | None


class ErrorResponse(BaseModel):
    """Every error of every route looks like this."""

    error: ErrorObject


class Live(BaseModel):
    """The process lives."""

    status: Literal["live"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method of a route, with the models of its bodies and the statuses of its errors."""

    method: str
    path: str
    id: str
    summary: str
    description: str = ""
    bodies: Mapping[str, type[BaseModel]] = field(default_factory=dict)  # by media type
    response: type[BaseModel] | None = None
    status: int = 200
    streams: bool = False
    parameters: Sequence[JsonObject] = ()
    errors: Sequence[int] = ()
    is_open: bool = False  # requires no API key


_BODY_ERRORS = (400, 413, 415)
_WORK_ERRORS = (429, 500, 503, 504, 507)
_JSON, _FORM, _SSE = "application/json", "multipart/form-data", "text/event-stream"

ERRORS: dict[int, str] = {
    400: "A field or the body is invalid; `param` names the field, and the message says which values are allowed.",
    401: "The API key is missing, malformed or wrong.",
    403: "The API key may not do this.",
    404: "Not found.",
    410: "The link has expired.",
    413: "The body is too large.",
    415: "The body's content type is not supported by this route, or the body is compressed.",
    429: (
        "The queue is full, or the images would not be ready before the deadline. `Retry-After` says when to retry; "
        "`x-should-retry: false` means that even an idle server would be too late."
    ),
    500: (
        "An internal error; the server's log has the details under the request id. The code `image_not_finite` means "
        "that the model computed invalid values, and would do so again for the same request."
    ),
    503: "The model is temporarily unavailable; `Retry-After` says when to retry.",
    504: "The images were not ready in time.",
    507: "The server's disk is full.",
}
_RETRYABLE = (429, 503)

_GENERATED_SIZE = "x-hypergen-generated-size"
_IMAGE_HEADERS = (
    "x-hypergen-queue-position",
    "x-hypergen-estimated-ms",
    "x-hypergen-prompt-truncated",
    _GENERATED_SIZE,
)
_TEXT_HEADERS = {"x-request-id", _GENERATED_SIZE}

_NULL = {"type": "null"}
_SAY_NULL = {"Health", "ErrorObject"}
_TAKE_NULL = {"ImageRequest", "EditRequest"}

_STREAM = (
    "With `stream: true`, the response is server-sent events: up to `partial_images` previews of each image, then the "
    'image. Comments keep an idle stream open; an error after the first event ends it with `data: {"error": …}`.'
)
_REPEAT = (
    "A request that is repeated with the same `Idempotency-Key` header is generated once, and every copy gets the "
    "response; the same holds for the automatic retries of OpenAI's clients after a lost connection."
)
_EDIT = (
    "The pixels of the first image that are transparent in `mask` are regenerated, and the others stay. Without a "
    "mask, the image's own transparency is the mask; an opaque image is regenerated as a whole. With k input images, "
    "image i starts from input image i mod k. `size: auto` is the input image's size."
)


def _parameter(name: str, place: str, description: str, schema: JsonObject | None = None) -> JsonObject:
    schema = {"type": "string"} if schema is None else schema
    return {"name": name, "in": place, "required": True, "description": description, "schema": schema}


OPERATIONS = (
    Operation(
        method="post",
        path="/v1/images/generations",
        id="createImage",
        summary="Generate images from a prompt",
        description=f"{_STREAM} {_REPEAT}",
        bodies={_JSON: ImageRequest},
        response=ImagesResponse,
        streams=True,
        errors=(*_BODY_ERRORS, *_WORK_ERRORS),
    ),
    Operation(
        method="post",
        path="/v1/images/edits",
        id="createImageEdit",
        summary="Edit images by a prompt",
        description=f"{_EDIT} {_STREAM} {_REPEAT}",
        bodies={_FORM: EditForm, _JSON: EditRequest},
        response=ImagesResponse,
        streams=True,
        errors=(*_BODY_ERRORS, *_WORK_ERRORS),
    ),
    Operation(
        method="post",
        path="/v1/images/variations",
        id="createImageVariation",
        summary="Generate variations of an image",
        description=_REPEAT,
        bodies={_FORM: VariationForm},
        response=ImagesResponse,
        errors=(*_BODY_ERRORS, *_WORK_ERRORS),
    ),
    Operation(
        method="get",
        path="/v1/models",
        id="listModels",
        summary="List the served model",
        response=ModelList,
        errors=(500, 503),
    ),
    Operation(
        method="get",
        path="/v1/models/{id}",
        id="retrieveModel",
        summary="Retrieve the model by its id or an alias, with slashes escaped or not",
        response=ModelObject,
        parameters=(_parameter("id", "path", "An id from /v1/models."),),
        errors=(404, 500, 503),
    ),
    Operation(
        method="get",
        path="/v1/capabilities",
        id="readCapabilities",
        summary="Describe what the served model supports (an extension of the API)",
        response=Capabilities,
        errors=(500, 503),
    ),
    Operation(
        method="get",
        path="/v1/loras",
        id="listLoras",
        summary="List the LoRAs that requests may name (an extension of the API)",
        response=LoraList,
        errors=(500, 503),
    ),
    Operation(
        method="post",
        path="/v1/loras",
        id="addLora",
        summary="Add a LoRA, for keys with that right (an extension of the API)",
        description="The file is stored in the folder of `--lora-dir`. Some seconds later `GET /v1/loras` lists it, "
        "with an error if it cannot be served.",
        bodies={_FORM: LoraForm},
        response=LoraObject,
        status=202,
        errors=(*_BODY_ERRORS, 403, 404, 500, 507),
    ),
    Operation(
        method="delete",
        path="/v1/loras/{name}",
        id="removeLora",
        summary="Remove a LoRA's file, for keys with that right (an extension of the API)",
        response=DeletedLora,
        parameters=(_parameter("name", "path", "A name from /v1/loras."),),
        errors=(403, 404, 500),
    ),
    Operation(
        method="get",
        path=f"{FILES_PATH}/{{name}}",
        id="readFile",
        summary="Download the image behind a link",
        description="Links are in responses to `response_format: url`; use them unchanged.",
        parameters=(
            _parameter("name", "path", "The file's name."),
            _parameter("expires", "query", "When the link expires, in seconds since 1970."),
            _parameter("signature", "query", "The server's signature of the link."),
        ),
        errors=(404, 410, 500),
        is_open=True,
    ),
    Operation(
        method="get",
        path="/health",
        id="health",
        summary="The server's state; 200 while the process runs",
        response=Health,
        is_open=True,
    ),
    Operation(
        method="get",
        path="/health/live",
        id="live",
        summary="Liveness: whether the process runs",
        response=Live,
        is_open=True,
    ),
    Operation(
        method="get",
        path="/health/ready",
        id="ready",
        summary="Readiness: whether images can be generated; 503 if not",
        response=Health,
        is_open=True,
    ),
)


@functools.lru_cache(maxsize=4)
def describe_api(model: ModelDescription | None, *, secured: bool) -> JsonObject:
    """The OpenAPI document. `model` is the served model, if known; `secured` says that an API key is required."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "HyperGen",
            "version": version("hypergen-triton"),
            "description": "OpenAI's Images API on your own machine, with the parameters of diffusion models.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(model),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if secured else [{}, {"key": []}],
    }


def _paths() -> JsonObject:
    paths: JsonObject = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return paths


def _operation(operation: Operation) -> JsonObject:
    errors = sorted({*operation.errors, *(() if operation.is_open else (401,))})
    described: JsonObject = {
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": list(operation.parameters),
        "responses": {str(operation.status): _success(operation), **{str(status): _error(status) for status in errors}},
    }
    if operation.description:
        described["description"] = operation.description
    if operation.bodies:
        content = {media_type: {"schema": _reference(model)} for media_type, model in operation.bodies.items()}
        described["requestBody"] = {"required": True, "content": content}
    if operation.is_open:
        described["security"] = []
    if operation.path == "/health/ready":
        described["responses"]["503"] = described["responses"]["200"] | {"description": "Images cannot be generated."}
    return described


def _success(operation: Operation) -> JsonObject:
    headers = _headers(
        "x-request-id", "openai-processing-ms", *(_IMAGE_HEADERS if operation.response is ImagesResponse else ())
    )
    if operation.response is None:
        file = {"schema": {"type": "string", "format": "binary"}}
        files = {f"image/{name}": file for name in ("png", "jpeg", "webp")}
        return {"description": "The image.", "headers": headers, "content": files}
    content: JsonObject = {_JSON: {"schema": _reference(operation.response)}}
    if operation.streams:
        events = [_reference(PartialImageEvent), _reference(CompletedEvent)]
        content[_SSE] = {"schema": {"type": "string", "description": _STREAM}, "x-events": events}
    return {
        "description": (operation.response.__doc__ or "").partition("\n")[0],
        "headers": headers,
        "content": content,
    }


def _error(status: int) -> JsonObject:
    headers = _headers("x-request-id", *(("Retry-After", "retry-after-ms") if status in _RETRYABLE else ()))
    content = {_JSON: {"schema": _reference(ErrorResponse)}}
    return {"description": ERRORS[status], "headers": headers, "content": content}


def _headers(*names: str) -> JsonObject:
    return {name: {"schema": {"type": "string" if name in _TEXT_HEADERS else "integer"}} for name in names}


def _reference(model: type[BaseModel]) -> JsonObject:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schemas(model: ModelDescription | None) -> JsonObject:
    requests = {body for operation in OPERATIONS for body in operation.bodies.values()}
    responses: set[type[BaseModel]] = {operation.response for operation in OPERATIONS if operation.response is not None}
    events: set[type[BaseModel]] = {PartialImageEvent, CompletedEvent}
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((request, "validation") for request in _by_name(requests)),
        *((response, "serialization") for response in _by_name({*responses, *events, ErrorResponse})),
    ]
    _, schema = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    definitions: JsonObject = schema["$defs"]
    for request in requests:
        if model is not None and issubclass(request, ImageFields):
            _limit(request, definitions[request.__name__]["properties"], model)
    for name, described in definitions.items():
        _tidy(described)
        if name in _SAY_NULL:
            continue
        _without_null(described)
        if name in _TAKE_NULL:
            _with_null(described)
    return definitions


def _by_name(models: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    return sorted(models, key=lambda model: model.__name__)


def _limit(request: type[BaseModel], properties: JsonObject, model: ModelDescription) -> None:
    """Adds the served model's defaults and limits."""
    for name, described in properties.items():
        if limit := model_limit(request, name):
            bounds = described.get("anyOf", [described])[0]
            bounds["maximum"] = getattr(model, limit.name)
            if limit.lower:
                bounds["minimum"] = getattr(model, limit.lower)
    properties["size"]["examples"] = list(model.sizes) or [f"{model.default_width}x{model.default_height}"]
    for name, values in {"scheduler": model.schedulers, "prompt_weighting": model.prompt_weightings}.items():
        properties[name]["anyOf"][0]["enum"] = list(values)
    for name in ("num_inference_steps", "guidance_scale"):
        properties[name]["description"] += f" The model's own: {getattr(model, f'default_{name}'):g}."


def _tidy(schema: JsonObject) -> None:
    """Moves required fields to the top, as most API references do, and drops titles that repeat names."""
    schema.pop("title", None)
    properties, required = schema["properties"], schema.get("required", [])
    schema["properties"] = {
        name: properties[name] for name in sorted(properties, key=lambda name: name not in required)
    }
    for described in properties.values():
        described.pop("title", None)
        if described.get("default", ...) is None:
            del described["default"]


def _without_null(schema: JsonObject) -> None:
    """Removes null from the types of all fields: a form cannot express it, and a response omits unknown values."""
    for name, described in schema["properties"].items():
        if _NULL not in described.get("anyOf", []):
            continue
        others = [each for each in described.pop("anyOf") if each != _NULL]
        described.update(others[0] if len(others) == 1 else {"anyOf": others})
        if name in schema.get("required", []):  # pydantic lists a nullable field without a default as required
            schema["required"].remove(name)


def _with_null(schema: JsonObject) -> None:
    """Allows null in all optional fields: in JSON, it is the same as an absent field, as it is for OpenAI."""
    for name, described in schema["properties"].items():
        if name not in schema["required"]:
            about = {key: described.pop(key) for key in ("description", "default", "examples") if key in described}
            schema["properties"][name] = {"anyOf": [described, _NULL]} | about
