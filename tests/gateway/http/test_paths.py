"""The ways in which clients write a route's path, and what those are told who ask for another."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from starlette.routing import Route

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.http.paths import ROUTES, canonical_path
from support.fake_backend import FakeBackend, in_memory, on_loopback
from support.image_files import file_of, photo
from support.node_client import run_node_client
from support.wire import error_of

KEY = "sk-correct-horse"
FOX = {"prompt": "a fox"}
GENERATIONS = "/v1/images/generations"
BEARER = {"Authorization": f"Bearer {KEY}"}

WRITTEN = [
    "//v1/images/generations", "/v1//images/generations", "/v1/images//generations", "/v1/images/generations/",
    "///v1///images///generations///", "/v1/images/generations?api-version=2025-04-01-preview",
    "/%2Fv1/images/generations", "/v1/images/generations%2F",
    "/openai/deployments/dall-e-3/images/generations?api-version=2024-10-21",
    "/openai/deployments/acme%2Ftiny/images/generations", "/openai/deployments/images/images/generations/",
    "/openai/v1/images/generations", "//openai//v1/images/generations", "/openai/images/generations",
]  # fmt: skip


@pytest.fixture
async def locked(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(create_app(Config(api_key=KEY, max_body_bytes=1000), backend)) as client:
        yield client


class TestOneRoute:
    @pytest.mark.parametrize("path", WRITTEN)
    async def test_it_is_served_checked_limited_counted_and_logged_under_its_own_path(
        self, locked: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        caplog.set_level(logging.INFO, "hypergen_gateway.access")
        url = f"http://gateway{path}"
        answers = [
            await locked.post(url, json=FOX, headers=BEARER),
            await locked.post(url, json=FOX),
            await locked.post(url, content=b" " * 1001, headers=BEARER | {"Content-Type": "application/json"}),
            await locked.get(url, headers=BEARER),
        ]
        assert [answer.status_code for answer in answers] == [200, 401, 413, 405]
        assert [generation.prompt for generation in backend.generations] == ["a fox"]
        lines = [record.getMessage().split()[:3] for record in caplog.records]
        assert lines == [["POST", GENERATIONS, status] for status in ("200", "401", "413")] + [
            ["GET", GENERATIONS, "405"]
        ]
        exposition = (await locked.get("/metrics")).text
        assert f'requests_total{{method="POST",route="{GENERATIONS}",status="200"}} 1.0' in exposition
        assert f'requests_total{{method="POST",route="{GENERATIONS}",status="413"}} 1.0' in exposition

    @pytest.mark.parametrize(
        "path", ["/health/", "//health", "/health//live/", "//", "/docs/", "/openapi.json/", "/web//app.js"]
    )
    async def test_what_is_open_is_open_however_it_is_written(self, locked: httpx.AsyncClient, path: str) -> None:
        assert (await locked.get(f"http://gateway{path}")).status_code == 200

    @pytest.mark.parametrize(
        "path", ["/v1/models/", "//v1//models", "/web/../v1/models", "/health/../v1/models", "/files//../v1/models"]
    )
    async def test_what_is_locked_is_locked(self, locked: httpx.AsyncClient, path: str) -> None:
        request = locked.build_request("GET", "http://gateway/")
        request.url = httpx.URL("http://gateway", raw_path=path.encode())
        assert (await locked.send(request)).status_code in (401, 404)

    async def test_a_retry_on_another_path_is_the_same_request(
        self, locked: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        for path in (GENERATIONS, "//v1/images/generations", "/openai/deployments/x/images/generations"):
            headers = BEARER | {"Idempotency-Key": "k"}
            assert (await locked.post(f"http://gateway{path}", json=FOX, headers=headers)).status_code == 200
        assert len(backend.generations) == 1

    def test_the_openapi_paths_are_their_own(self) -> None:
        for path in ("/", "/v1/models", GENERATIONS, "/health/live", "/files/x.png", "/v1/models/acme/tiny-emoji"):
            assert canonical_path(path) == path


class TestModels:
    @pytest.mark.parametrize("model", ["acme/tiny", "/srv/models/tiny", "./models//tiny/", "tiny", "v1/models"])
    async def test_the_id_may_be_a_path_of_any_kind(self, backend: FakeBackend, model: str) -> None:
        async with in_memory(create_app(Config(model_id=model), backend)) as client:
            for path in (f"/v1/models/{model}", f"/v1/models/{model.replace('/', '%2F')}", f"//openai/models/{model}/"):
                answer = await client.get(f"http://gateway{path}")
                assert (answer.status_code, answer.json()["id"]) == (200, model)
            assert (await client.get("/v1/models/other")).status_code == 404

    async def test_an_alias_is_found_and_answered_as_what_was_asked_for(self, backend: FakeBackend) -> None:
        config = Config(model_id="acme/tiny", model_aliases=("gpt-image-1", "org/dall-e-3"))
        async with in_memory(create_app(config, backend)) as client:
            for alias in ("gpt-image-1", "org/dall-e-3", "org%2Fdall-e-3"):
                answer = await client.get(f"/v1/models/{alias}")
                assert (answer.status_code, answer.json()["id"]) == (200, alias.replace("%2F", "/"))
                assert {answer.json()[key] for key in ("object", "owned_by")} == {"model", "hypergen"}
            assert [model["id"] for model in (await client.get("/v1/models/")).json()["data"]] == ["acme/tiny"]
            refused = await client.get("/v1/models/dall-e-2")
        assert (refused.status_code, error_of(refused)["code"]) == (404, "model_not_found")


class TestNoRoute:
    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("/v1/chat/completions", "use /v1/images/generations"),
            ("/v1/responses", "use /v1/images/generations"),
            ("/v1/completions", "use /v1/images/generations"),
            ("/v1/embeddings", "use /v1/images/generations"),
            ("/v1/audio/speech", "use /v1/images/generations"),
            ("/v1/audio/transcriptions", "use /v1/images/generations"),
            ("/chat/completions", "use /v1/images/generations"),
            ("/openai/deployments/gpt-4o/chat/completions", "use /v1/images/generations"),
            ("/images/generations", "Use /v1/images/generations: a client's base URL must end in /v1."),
            ("/images/edits", "Use /v1/images/edits"),
            ("/images/variations", "Use /v1/images/variations"),
            ("/models", "Use /v1/models:"),
            ("/models/acme/tiny", "Use /v1/models:"),
            ("/v1/v1/images/generations", "Use /v1/images/generations"),
            ("/api/v1/images/generations", "Use /v1/images/generations"),
            ("/v1/images/edit", "Did you mean /v1/images/edits?"),
            ("/v1/image/edits", "Did you mean /v1/images/edits?"),
            ("/v1/image/generations", "Did you mean /v1/images/generations?"),
            ("/v1/images/generation", "Did you mean /v1/images/generations?"),
            ("/v1/images/generate", "Did you mean /v1/images/generations?"),
            ("/image/generation", "Did you mean /v1/images/generations?"),
            ("/v1/images/variation", "Did you mean /v1/images/variations?"),
            ("/V1/Images/Generations", "Did you mean /v1/images/generations?"),
            ("/v1/model", "Did you mean /v1/models?"),
            ("/v1/capability", "Did you mean /v1/capabilities?"),
            ("/healthz", "Did you mean /health?"),
        ],
    )
    async def test_it_says_where_to_ask(self, client: httpx.AsyncClient, path: str, words: str) -> None:
        answer = await client.post(path, json=FOX)
        error = error_of(answer)
        assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "not_found")
        assert words in str(error["message"])

    @pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/files", "/v1/threads", "/favicon.ico", "/robots.txt"])
    async def test_where_nobody_can_tell_nothing_is_guessed(self, client: httpx.AsyncClient, path: str) -> None:
        assert error_of(await client.get(path))["message"] == f"Not found: GET {path}."

    def test_what_is_guessed_exists(self, backend: FakeBackend) -> None:
        routes = {route.path for route in create_app(Config(), backend).routes if isinstance(route, Route)}
        assert set(ROUTES) <= routes


class TestAzure:
    @pytest.fixture
    async def url(self, backend: FakeBackend) -> AsyncIterator[str]:
        async with on_loopback(create_app(Config(api_key=KEY, model_aliases=("gpt-image-1",)), backend)) as url:
            yield url

    @pytest.mark.parametrize("deployment", [None, "my-painter"])
    async def test_openai_s_client_for_azure_works_unchanged(
        self, url: str, backend: FakeBackend, deployment: str | None
    ) -> None:
        async with openai.AsyncAzureOpenAI(
            azure_endpoint=url, azure_deployment=deployment, api_key=KEY, api_version="2025-04-01-preview"
        ) as azure:
            generated = await azure.images.generate(model="gpt-image-1", prompt="a fox", n=2)
            edited = await azure.images.edit(model="acme/tiny-emoji", prompt="a cat", image=file_of(photo()))
            assert [len(answer.data or []) for answer in (generated, edited)] == [2, 1]
            assert [model.id async for model in azure.models.list()] == ["acme/tiny-emoji"]
            assert (await azure.models.retrieve("gpt-image-1")).id == "gpt-image-1"
        assert [generation.prompt for generation in backend.generations] == ["a fox", "a cat"]

    async def test_openai_s_client_for_azure_in_node_does_too(self, url: str, node: Path) -> None:
        seen = (await run_node_client(node, f"{url}/v1", KEY, script="azure.mjs"))["seen"]
        assert seen == [{"generated": 7, "edited": 8, "models": ["acme/tiny-emoji"]}] * 2

    async def test_a_wrong_key_is_an_authentication_error(self, url: str) -> None:
        async with openai.AsyncAzureOpenAI(azure_endpoint=url, api_key="wrong", api_version="2024-10-21") as azure:
            with pytest.raises(openai.AuthenticationError):
                await azure.images.generate(model="x", prompt="a fox")

    async def test_azure_s_newer_api_is_the_plain_client_at_another_path(self, url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/openai/v1/", api_key=KEY) as client:
            assert len((await client.images.generate(model="gpt-image-1", prompt="a fox")).data or []) == 1
