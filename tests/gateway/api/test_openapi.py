"""The API's description: true to the routes and the answers, and readable."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import openapi_spec_validator
import pytest
from starlette.routing import Route

from hypergen_gateway.api.openapi import describe_api
from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from support.fake_backend import MODEL, FakeBackend, in_memory
from support.image_files import file_of, photo

API = describe_api(MODEL, secured=False)


def validator(name: str) -> Any:
    """Of one of the schemas that the description holds."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": API["components"]}
    return jsonschema.Draft202012Validator(schema)


# Pages for people, and one for Prometheus.
PAGES = ("/openapi.json", "/docs", "/", "/web/{name}", "/metrics")


def test_every_route_is_described_and_nothing_else(backend: FakeBackend) -> None:
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in create_app(Config(), backend).routes
        if isinstance(route, Route) and route.path not in PAGES
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(path, method) for path, methods in API["paths"].items() for method in methods}
    assert described == served


def test_it_is_openapi() -> None:
    openapi_spec_validator.validate(API)


def test_every_reference_leads_somewhere_and_no_schema_is_left_over() -> None:
    named = set(re.findall(r"'#/components/schemas/(\w+)'", str(API)))
    assert named == set(API["components"]["schemas"])


@pytest.mark.parametrize("secured", [True, False])
async def test_it_is_read_without_a_key_and_says_whether_one_is_needed(backend: FakeBackend, secured: bool) -> None:
    async with in_memory(create_app(Config(api_key="k" if secured else None), backend)) as client:
        api = (await client.get("/openapi.json")).json()
    assert api["security"] == ([{"key": []}] if secured else [{}, {"key": []}])
    assert api["paths"]["/health"]["get"]["security"] == []


async def test_it_is_there_without_a_model_and_tells_a_model_s_limits_when_there_is_one(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.description = UnavailableError("away")
    fields = (await client.get("/openapi.json")).json()["components"]["schemas"]["ImageRequest"]["properties"]
    assert "enum" not in fields["scheduler"]["anyOf"][0]
    backend.description = replace(MODEL, max_num_images=4, sizes=("512x512",))
    fields = (await client.get("/openapi.json")).json()["components"]["schemas"]["ImageRequest"]["properties"]
    assert fields["scheduler"]["anyOf"][0]["enum"] == ["ddim", "euler", "euler_a"]
    assert fields["prompt_weighting"]["anyOf"][0]["enum"] == ["none"]
    assert fields["n"]["anyOf"][0]["maximum"] == 4
    assert fields["size"]["examples"] == ["512x512"]
    assert "The model's own: 20." in fields["num_inference_steps"]["description"]


@pytest.mark.parametrize(
    ("method", "path", "request_", "name"),
    [
        ("POST", "/v1/images/generations", {"json": {"prompt": "a", "n": 2}}, "ImagesResponse"),
        ("POST", "/v1/images/generations", {"json": {"prompt": "a", "response_format": "url"}}, "ImagesResponse"),
        ("POST", "/v1/images/variations", {"files": {"image": file_of(photo())}}, "ImagesResponse"),
        ("GET", "/v1/models", {}, "ModelList"),
        ("GET", "/v1/capabilities", {}, "Capabilities"),
        ("GET", "/v1/loras", {}, "LoraList"),
        ("GET", "/v1/models/acme/tiny-emoji", {}, "ModelObject"),
        ("GET", "/health", {}, "Health"),
        ("GET", "/health/ready", {}, "Health"),
        ("GET", "/health/live", {}, "Live"),
        ("GET", "/nowhere", {}, "ErrorResponse"),
        ("POST", "/v1/images/generations", {"json": {}}, "ErrorResponse"),
    ],
)
async def test_answers_are_as_described_and_have_no_other_fields(
    client: httpx.AsyncClient, method: str, path: str, request_: Any, name: str
) -> None:
    body = (await client.request(method, path, **request_)).json()
    validator(name).validate(body)
    assert set(body) <= set(API["components"]["schemas"][name]["properties"])


def test_a_form_cannot_say_null_and_json_may() -> None:
    assert '"null"' not in str(API["components"]["schemas"]["EditForm"]).replace("'", '"')
    validator("ImageRequest").validate({"prompt": "a", "n": None, "size": None, "seed": None, "stream": None})
    with pytest.raises(jsonschema.ValidationError):
        validator("ImageRequest").validate({"prompt": None})


class TestPage:
    async def test_nothing_comes_from_elsewhere_and_the_policy_sees_to_it(self, client: httpx.AsyncClient) -> None:
        response = await client.get("/docs")
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        (style,) = re.findall("<style>(.*?)</style>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = response.headers["content-security-policy"]
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
        assert "url(" not in style
        for word in ("<script", "<link", "<img", "style=", "onclick", "@import"):
            assert word not in response.text
        assert set(re.findall(r'href="([^#"]*)', response.text)) == {"", "openapi.json"}

    async def test_it_names_every_route_field_status_and_the_server(self, client: httpx.AsyncClient) -> None:
        page = (await client.get("/docs")).text
        for path, methods in API["paths"].items():
            assert path in page
            assert all(f'id="{operation["operationId"]}"' in page for operation in methods.values())
        for name in ("ImageRequest", "EditForm", "EditRequest", "VariationForm"):
            for field in API["components"]["schemas"][name]["properties"]:
                assert f"<code>{field}</code>" in page
        assert "curl http://gateway/v1/images/generations" in page

    async def test_what_it_is_told_is_shown_and_not_obeyed(self, backend: FakeBackend) -> None:
        backend.description = replace(MODEL, schedulers=("<script>alert(1)</script>",))
        async with in_memory(create_app(Config(public_url="https://x.example/<b>"), backend)) as client:
            page = (await client.get("/docs")).text
        assert "<script" not in page
        assert "<b>" not in page
