"""What browsers are told, and which websites may use the API: over HTTP, and in a real Chromium."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import UnavailableError
from support.browser import chromium, needs_chromium, opened
from support.fake_backend import FakeBackend, in_memory, on_loopback
from support.wire import error_of, form, part

URL = "/v1/images/generations"
FOX = {"prompt": "a fox"}
APP = "https://app.example.com"
KEY = "s3cr3t"
PREFLIGHT = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def gateway(backend: FakeBackend, **settings: object) -> httpx.AsyncClient:
    return in_memory(create_app(Config(**settings), backend))  # type: ignore[arg-type]


class TestHeaders:
    @pytest.mark.parametrize(
        "path", ["/", "/docs", "/web/app.js", "/openapi.json", "/health", "/metrics", "/v1/models", "/nowhere"]
    )
    async def test_every_answer_is_kept_to_itself(self, client: httpx.AsyncClient, path: str) -> None:
        headers = (await client.get(path)).headers
        assert headers["content-security-policy"].startswith("default-src 'none';")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == ("no-cache" if path in ("/", "/web/app.js") else "no-store")
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers

    async def test_images_are_not_cached_and_errors_neither(
        self, client: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        answers = [await client.post(URL, json=FOX), await client.post(URL, json={})]
        backend.failure = RuntimeError("boom")
        answers.append(await client.post(URL, json=FOX))
        assert [answer.status_code for answer in answers] == [200, 400, 500]
        for answer in answers:
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-content-type-options"] == "nosniff"

    async def test_a_link_may_be_shown_by_other_websites_and_lasts_no_longer_in_a_cache(
        self, client: httpx.AsyncClient
    ) -> None:
        answer = await client.post(URL, json=FOX | {"response_format": "url"})
        image = await client.get(answer.json()["data"][0]["url"])
        assert image.headers["content-type"] == "image/png"
        assert image.headers["cross-origin-resource-policy"] == "cross-origin"
        assert image.headers["cache-control"].startswith("private, max-age=")
        assert image.headers["x-content-type-options"] == "nosniff"
        assert image.headers["content-security-policy"].endswith("sandbox")

    async def test_a_stream_says_itself_how_it_is_cached(self, client: httpx.AsyncClient) -> None:
        answer = await client.post(URL, json=FOX | {"stream": True})
        assert answer.headers.get_list("cache-control") == ["no-cache, no-transform"]


class TestCors:
    @pytest.fixture
    async def shared(self, backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
        async with gateway(backend, api_key=KEY, cors_origins=(APP,)) as client:
            yield client

    async def test_without_being_asked_for_it_is_off(self, client: httpx.AsyncClient) -> None:
        answer = await client.options(URL, headers=PREFLIGHT)
        assert not [name for name in answer.headers if name.startswith("access-control")]

    async def test_every_method_of_the_api_is_allowed(self, shared: httpx.AsyncClient) -> None:
        described = (await shared.get("/openapi.json")).json()["paths"]
        for method in {method.upper() for route in described.values() for method in route}:
            preflight = await shared.options(
                "/v1/loras/ink", headers=PREFLIGHT | {"Access-Control-Request-Method": method}
            )
            assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, APP)

    async def test_a_preflight_needs_no_key_and_allows_what_the_sdk_sends(self, shared: httpx.AsyncClient) -> None:
        answer = await shared.options(URL, headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert "access-control-allow-credentials" not in answer.headers

    async def test_another_origin_is_not_named(self, shared: httpx.AsyncClient) -> None:
        for origin in ("https://evil.example", f"{APP}.evil.example", f"{APP}:444", "http://app.example.com", "null"):
            preflight = await shared.options(URL, headers=PREFLIGHT | {"Origin": origin})
            answer = await shared.get("/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
            assert preflight.status_code == 400
            assert error_of(preflight)["code"] == "cross_site_request"
            assert "origin" in str(error_of(preflight)["message"])
            assert "access-control-allow-origin" not in preflight.headers
            assert "access-control-allow-origin" not in answer.headers

    async def test_a_method_that_is_not_allowed_is_named(self, shared: httpx.AsyncClient) -> None:
        preflight = await shared.options(URL, headers=PREFLIGHT | {"Access-Control-Request-Method": "PUT"})
        assert (preflight.status_code, "method" in str(error_of(preflight)["message"])) == (400, True)
        assert preflight.headers["access-control-allow-methods"] == "GET, POST, DELETE"
        assert preflight.headers["access-control-allow-origin"] == APP

    async def test_scripts_can_read_answers_and_errors_alike(
        self, shared: httpx.AsyncClient, backend: FakeBackend
    ) -> None:
        headers = {"Origin": APP, "Authorization": f"Bearer {KEY}"}
        answers = [
            await shared.post(URL, json=FOX, headers=headers),
            await shared.post(URL, json=FOX, headers={"Origin": APP}),
            await shared.get("/nowhere", headers=headers),
        ]
        backend.failure = UnavailableError("not yet")
        answers.append(await shared.post(URL, json=FOX, headers=headers))
        backend.failure = RuntimeError("boom")
        answers.append(await shared.post(URL, json=FOX, headers=headers))
        assert [answer.status_code for answer in answers] == [200, 401, 404, 503, 500]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == APP
            assert answer.headers["vary"] == "Origin"
            assert {"retry-after", "x-request-id"} <= set(answer.headers["access-control-expose-headers"].split(", "))

    async def test_every_website_without_a_key_is_said_at_the_start(
        self, backend: FakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with gateway(backend, cors_origins=("*",)) as client:
            answer = await client.post(URL, json=FOX, headers={"Origin": "https://any.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert "Every website may use this server" in caplog.text

    @pytest.mark.parametrize(
        "origin", ["app.example.com", f"{APP}/", f"{APP}/x", "https://*.example.com/", "HTTPS://APP.example.com", ""]
    )
    def test_what_no_browser_would_send_is_refused(self, origin: str) -> None:
        with pytest.raises(ValueError, match="an origin for CORS must look like"):
            Config(cors_origins=(origin,))


class TestOtherWebsites:
    """A server that asks for no key, and a website that sends what needs no preflight."""

    @staticmethod
    async def post(client: httpx.AsyncClient, host: str, origin: str | None) -> httpx.Response:
        request = form(part("image", b"not one", filename="x.png"))
        headers = request.pop("headers") | {"Host": host} | ({} if origin is None else {"Origin": origin})
        return await client.post("/v1/images/variations", headers=headers, **request)

    @pytest.mark.parametrize(
        ("host", "origin"),
        [
            ("localhost:8000", "https://evil.example"),
            ("localhost:8000", "http://localhost:3000"),
            ("localhost:8000", "null"),
            ("localhost:8000", ""),
            ("localhost:8000", "http://localhost:8000.evil.example"),
            # its own name leads here for once: DNS rebinding
            ("evil.example:8000", "http://evil.example:8000"),
            ("local.evil.example", "http://local.evil.example"),
            ("", "null"),
            ("[::1", "http://[::1"),
        ],
    )
    async def test_it_gets_no_image(
        self, client: httpx.AsyncClient, backend: FakeBackend, host: str, origin: str
    ) -> None:
        answer = await self.post(client, host, origin)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "cross_site_request")
        answer = await client.post(URL, json=FOX, headers={"Host": host, "Origin": origin})
        assert answer.status_code == 403
        assert backend.generations == []

    @pytest.mark.parametrize(
        ("host", "origin"),
        [
            ("localhost:8000", None),
            ("images.example.com", None),
            ("localhost:8000", "http://localhost:8000"),
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("[::1]:8000", "http://[::1]:8000"),
            ("192.168.1.20:8000", "http://192.168.1.20:8000"),
            ("workstation:8000", "http://workstation:8000"),
            ("workstation.local:8000", "http://workstation.local:8000"),
            ("gateway", "https://images.example.com"),
            ("localhost:8000", APP),
        ],
    )
    async def test_programs_the_own_page_and_whoever_was_named_are_answered(
        self, backend: FakeBackend, host: str, origin: str | None
    ) -> None:
        async with gateway(backend, cors_origins=(APP,), public_url="https://images.example.com/draw") as client:
            assert (await self.post(client, host, origin)).status_code == 400  # no image
            headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
            assert (await client.post(URL, json=FOX, headers=headers)).status_code == 200

    async def test_where_a_key_is_needed_the_key_decides(self, backend: FakeBackend) -> None:
        async with gateway(backend, api_key=KEY) as client:
            headers = {"Origin": "https://proxied.example"}
            assert (await client.post(URL, json=FOX, headers=headers)).status_code == 401
            headers["Authorization"] = f"Bearer {KEY}"
            assert (await client.post(URL, json=FOX, headers=headers)).status_code == 200


# A script of a website: what it may read of another origin's answers, and what its browser lets it send.
ASK = """async ([url, key]) => {
  const headers = {"Content-Type": "application/json", ...(key && {Authorization: `Bearer ${key}`})};
  try {
    const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify({prompt: "a fox"})});
    return [answer.status, answer.headers.get("x-request-id") !== null, "error" in await answer.json()];
  } catch { return "refused by the browser"; }
}"""
LOADED = "() => performance.getEntriesByType('resource').map(({name}) => name)"
SEND_FORM = """async (url) => {
  const body = new FormData();
  body.append("image", new Blob(["x"]), "x.png");
  try { await fetch(url, {method: "POST", mode: "no-cors", body}); } catch {}
}"""


@needs_chromium
async def test_pages_and_images_work_in_a_browser_under_their_own_policies(backend: FakeBackend) -> None:
    async with chromium() as browser, on_loopback(create_app(Config(), backend)) as url:
        async with httpx.AsyncClient() as client:
            answer = await client.post(url + URL, json=FOX | {"response_format": "url"})
        for address in (f"{url}/", f"{url}/docs", answer.json()["data"][0]["url"]):
            async with opened(browser, address) as page:  # fails if a policy stops anything
                assert {urlsplit(request).netloc for request in await page.evaluate(LOADED)} <= {urlsplit(url).netloc}


@needs_chromium
async def test_in_a_browser_a_website_gets_what_cors_allows_and_no_more(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hypergen_gateway.access")
    async with chromium() as browser, a_website() as website:
        page = await browser.new_page()
        await page.goto(website)
        async with on_loopback(create_app(Config(api_key=KEY, cors_origins=(website,)), FakeBackend())) as url:
            assert await page.evaluate(ASK, [url + URL, KEY]) == [200, True, False]
            assert await page.evaluate(ASK, [url + URL, "wrong"]) == [401, True, True]
        async with on_loopback(create_app(Config(), backend)) as url:
            assert await page.evaluate(ASK, [url + URL, ""]) == "refused by the browser"
            await page.evaluate(SEND_FORM, f"{url}/v1/images/variations")
    assert [line.getMessage().split()[:3] for line in caplog.records][-1] == ["POST", "/v1/images/variations", "403"]
    assert backend.generations == []


@asynccontextmanager
async def a_website() -> AsyncIterator[str]:
    """Another origin, whose page has no policy that would hold its scripts back."""
    async with on_loopback(Starlette(routes=[Route("/", lambda _: HTMLResponse("<h1>free images</h1>"))])) as url:
        yield url
