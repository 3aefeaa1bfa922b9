"""schemathesis against our own description: no 5xx, no answer that is not described, nothing wrong that is taken.

Left out: events, which it cannot read, and what is wrong in a form, where every value is a text and schemathesis
cannot tell.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from hypergen_gateway.api.openapi import describe_api
from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import MODEL, FakeBackend
from support.image_files import bomb, file_of, hole, photo

# What is legal here depends on the model or on another field, which the description tells in words alone.
BEYOND_WORDS: dict[str, Any] = {
    "size": "auto",
    "background": "auto",
    "output_format": "webp",
    "lora_path": None,
    "loras": [],
    "seed": 1,
}
BEYOND_WORDS |= {"guidance_start": 0.25, "guidance_end": 0.75}
BEYOND_WORDS |= {"skip_layer_guidance_start": None, "skip_layer_guidance_stop": None}
# A deadline of a millisecond passes, and that is a 504.
BEYOND_WORDS["deadline_ms"] = None

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]

API = describe_api(MODEL, secured=False)

# Without a body, nothing can be wrong with a request.
OPERATIONS = [
    (path, method, mode)
    for path, methods in API["paths"].items()
    for method, operation in methods.items()
    for mode in (list(GenerationMode) if "requestBody" in operation else [GenerationMode.POSITIVE])
]

# Random bytes are no image, and then nothing behind the reading of files would be seen.
schemathesis.openapi.format(
    "binary",
    st.sampled_from([file_of(photo()), file_of(photo(), "JPEG"), file_of(hole()), file_of(hole(32, 32)), bomb(5000)])
    | st.binary(max_size=200),
)


@functools.cache
def described() -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(Config(), FakeBackend()))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_whatever_comes_is_answered_as_described(path: str, method: str, mode: GenerationMode) -> None:
    operation = described()[path][method]

    @settings(
        max_examples=30 if operation.body else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("stream", None)
            if mode is GenerationMode.POSITIVE:
                case.body.update(BEYOND_WORDS)
        is_form = case.media_type == "multipart/form-data"
        more = [] if is_form else [negative_data_rejection]
        if operation.definition.raw["operationId"] == "createImage":  # the one whose bodies hold no images
            more.append(positive_data_acceptance)
        case.validate_response(case.call(), checks=[*CHECKS, *more])

    answers()
