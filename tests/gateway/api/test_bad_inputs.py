"""Bodies that cannot be served: each a 4xx in OpenAI's shape, naming the parameter and what would be legal."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, in_memory
from support.wire import error_of

URL = "/v1/images/generations"

SIZES = "WIDTHxHEIGHT in pixels, such as '64x48', each side from 1 to 4096"

# field, value, words of the message
WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("prompt", "", "1 to 32,000"),
    ("prompt", "x" * 32_001, "1 to 32,000"),
    ("prompt", 7, "a string"),
    ("prompt", ["a", "b"], "a string"),
    ("prompt", {"text": "a"}, "a string"),
    ("model", 4, "a string"),
    ("n", 0, "from 1 to 10"),
    ("n", 11, "from 1 to 10"),
    ("n", -1, "from 1 to 10"),
    ("n", "2", "from 1 to 10"),
    ("n", 1.5, "from 1 to 10"),
    ("n", True, "from 1 to 10"),
    ("n", 2**70, "from 1 to 10"),
    ("n", [1], "from 1 to 10"),
    ("size", "banana", SIZES),
    ("size", "0x0", SIZES),
    ("size", "-64x64", SIZES),
    ("size", "0x64", SIZES),
    ("size", "64x4097", SIZES),
    ("size", "64X64", SIZES),
    ("size", "64x64 ", SIZES),
    ("size", "64x64\n", SIZES),
    ("size", "064x64", SIZES),
    ("size", "64x64x3", SIZES),
    ("size", "٦٤x٦٤", SIZES),
    ("size", "９６x９６", SIZES),
    ("size", "9" * 5000 + "x64", SIZES),
    ("size", 64, SIZES),
    ("size", [64, 64], SIZES),
    ("quality", "ultra", "'low', 'medium', 'high'"),
    ("quality", 1, "'low', 'medium', 'high'"),
    ("response_format", "xml", "b64_json"),
    ("output_format", "gif", "png"),
    ("output_format", "svg", "png"),
    ("output_compression", 101, "from 0 to 100"),
    ("output_compression", -1, "from 0 to 100"),
    ("output_compression", "50", "from 0 to 100"),
    ("output_compression", 50, "'jpeg' and 'webp'"),
    ("background", "transparent", "not supported by this server"),
    ("background", "pink", "'auto' or 'opaque'"),
    ("stream", "true", "true or false"),
    ("stream", 1, "true or false"),
    ("partial_images", 4, "from 0 to 3"),
    ("partial_images", -1, "from 0 to 3"),
    ("partial_images", True, "from 0 to 3"),
    ("moderation", "none", "'low' or 'auto'"),
    ("style", "baroque", "'vivid' or 'natural'"),
    ("user", 5, "a string"),
    ("negative_prompt", 5, "a string"),
    ("negative_prompt", "x" * 32_001, "at most 32,000"),
    ("num_inference_steps", 0, "from 1 to 150"),
    ("num_inference_steps", 151, "from 1 to 150"),
    ("num_inference_steps", "20", "from 1 to 150"),
    ("num_inference_steps", 20.5, "from 1 to 150"),
    ("guidance_scale", 0.99, "from 1 to 20"),
    ("guidance_scale", 20.01, "from 1 to 20"),
    ("guidance_scale", "7.5", "from 1 to 20"),
    ("guidance_scale", False, "from 1 to 20"),
    ("guidance_scale", 10**400, "from 1 to 20"),
    ("image_guidance_scale", 1.5, "absent, as the model does not edit by instruction"),
    ("guidance_start", -0.1, "from 0 to 1"),
    ("guidance_start", 1.1, "from 0 to 1"),
    ("guidance_start", "0.5", "from 0 to 1"),
    ("guidance_end", 1.1, "from 'guidance_start' to 1"),
    ("guidance_end", True, "from 'guidance_start' to 1"),
    ("cache_interval", 0, "1 or absent, as the model is served without --deep-cache"),
    ("cache_interval", 2, "1 or absent, as the model is served without --deep-cache"),
    ("cache_interval", 1.5, "1 or absent"),
    ("timestep_spacing", "even", "'leading', 'linspace' or 'trailing'"),
    ("sigmas", "linear", "'default', 'karras', 'exponential' or 'beta'"),
    ("eta", 1.1, "from 0 to 1"),
    ("guidance_rescale", "0.5", "from 0 to 1"),
    ("skip_layer_guidance_scale", 2.8, "absent or 0, as the model has no skip-layer guidance"),
    ("skip_layer_guidance_start", 0.1, "absent or 0, as the model has no skip-layer guidance"),
    ("skip_layer_guidance_stop", 1.5, "absent or 0, as the model has no skip-layer guidance"),
    ("prompt_weighting", "a1111", "absent or 'none', as the model's prompts have no weights"),
    ("prompt_weighting", 1, "absent or 'none'"),
    ("clip_skip", 1, "absent or 0, as the model's text encoders do not skip layers"),
    ("clip_skip", "1", "absent or 0"),
    ("scheduler", "magic", "ddim, euler, euler_a"),
    ("scheduler", "", "ddim, euler, euler_a"),
    ("scheduler", 3, "ddim, euler, euler_a"),
    ("seed", -2, "from 0 to 9223372036854775807"),
    ("seed", 2**63, "from 0 to 9223372036854775807"),
    ("seed", 1.5, "from 0 to 9223372036854775807"),
    ("seed", "1", "from 0 to 9223372036854775807"),
    ("lora_path", "/etc/passwd", "must be absent, as the model is served without any LoRA"),
    ("lora_scale", 11, "from -10 to 10"),
]

# body, param, words of the message
WRONG_BODIES: list[tuple[bytes, str | None, str]] = [
    (b"", None, "empty"),
    (b"{", None, "not valid JSON"),
    (b"prompt=a+fox", None, "not valid JSON"),
    (b'{"prompt": "a",}', None, "not valid JSON"),
    (b'{"prompt": "a"} {}', None, "not valid JSON"),
    (b"{'prompt': 'a'}", None, "not valid JSON"),
    (b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}', None, "not valid JSON"),
    (b'{"prompt": "\xff"}', None, "UTF-8"),
    ('{"prompt": "a"}'.encode("utf-16"), None, "UTF-8"),
    (b"null", None, "JSON object"),
    (b"7", None, "JSON object"),
    (b'"a fox"', None, "JSON object"),
    (b'[{"prompt": "a"}]', None, "JSON object"),
    (b'{"prompt": null}', "prompt", "missing"),
    (b"{}", "prompt", "missing"),
    (b'{"n": 2}', "prompt", "missing"),
    (b'{"prompt": "a", "guidance_scale": NaN}', None, "finite"),
    (b'{"prompt": "a", "guidance_scale": -Infinity}', None, "finite"),
    (b'{"prompt": "a", "unknown": [NaN]}', None, "finite"),
    (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale", "from 1 to 20"),
    (b'{"prompt": "a", "guidance_start": 0.5, "guidance_end": 0.4}', "guidance_end", "from 'guidance_start' to 1"),
    (b'{"prompt": "a", "n": 1, "n": 2}', "n", "twice"),
    (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', None, "twice"),
    (b'{"prompt": "a", "\\ud800": 1, "\\ud800": 1}', None, "twice"),
    (b'{"prompt": "\\ud800"}', "prompt", "half a character"),
    (b'{"prompt": "a", "size": "\\udfff"}', "size", "half a character"),
    (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}", None, "digits"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "deep"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None, "deep"),
    (b'{"prompt": "a", "stream": true, "response_format": "url"}', "response_format", "cannot be links"),
    (b'{"prompt": "a", "stream": true, "n": 0}', "n", "from 1 to 10"),
    (b'{"prompt": "a", "n": 10, "seed": 9223372036854775800}', "seed", "seed + n - 1"),
]


async def post(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    return await client.post(URL, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("field", "value", "words"), WRONG_VALUES)
async def test_a_wrong_value_is_a_400_that_names_the_field_and_what_is_legal(
    client: httpx.AsyncClient, backend: FakeBackend, field: str, value: object, words: str
) -> None:
    response = await post(client, json.dumps({"prompt": "a fox"} | {field: value}).encode())
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert field in str(error["message"])
    assert words in str(error["message"])
    assert backend.generations == []


@pytest.mark.parametrize(("body", "param", "words"), WRONG_BODIES)
async def test_a_body_that_is_not_a_request_is_a_400(
    client: httpx.AsyncClient, backend: FakeBackend, body: bytes, param: str | None, words: str
) -> None:
    began = time.perf_counter()
    response = await post(client, body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in str(error["message"])
    assert time.perf_counter() - began < 1
    assert backend.generations == []


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
async def test_another_content_type_is_a_415(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await client.post(URL, content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in str(error_of(response)["message"])


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_json_is_json_however_it_is_written(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(URL, content=b'{"prompt": "a"}', headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", URL, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/v1/models/x", 405),
        ("GET", "/index.html", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/chat/completions", 404),
        ("GET", URL + "/", 405),
        ("GET", "/openai", 404),
        ("GET", "/openai/v1", 404),
        ("GET", "/openai/deployments/x", 404),
        ("GET", "/%00%0a\u2028", 404),
        ("GET", "/../../etc/passwd", 404),
    ],
)
async def test_what_is_not_there_is_said_in_openai_s_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


async def test_a_body_over_the_limit_is_a_413_by_its_declared_length_and_by_its_real_one(backend: FakeBackend) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100

    async with in_memory(create_app(Config(max_body_bytes=1000), backend)) as client:
        for body in (b" " * 1001, chunks()):
            response = await client.post(URL, content=body, headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert "1,000 bytes" in str(error_of(response)["message"])
