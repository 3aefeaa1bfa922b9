"""What a proxy in front says of a request, and whose word counts."""

from __future__ import annotations

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, on_loopback

LINK = {"prompt": "a fox", "response_format": "url"}
# As nginx sends it where it serves us as https://images.example.com/hyper/ and takes the prefix off.
FORWARDED = {"Host": "images.example.com", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/hyper"}


async def link_of(backend: FakeBackend, headers: dict[str, str], path: str = "/v1", **settings: object) -> str:
    app = create_app(Config(**settings), backend)  # type: ignore[arg-type]
    async with on_loopback(app) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(f"{path}/images/generations", json=LINK, headers=headers)
        assert answer.status_code == 200, answer.text
        link = str(answer.json()["data"][0]["url"])
        file = link[link.index("/files/") :]
        assert (await client.get(file)).headers["content-type"] == "image/png"
        example = (await client.get("/docs", headers=headers)).text
        assert f"curl {link[: link.index('/files/')]}/v1/images/generations" in example
        return link[: link.index("/files/")]


@pytest.mark.parametrize("prefix", ["/hyper", "/hyper/", "/v1", "/a/b-c_d.e~f"])
async def test_links_lead_through_the_prefix_of_a_proxy_on_this_machine(backend: FakeBackend, prefix: str) -> None:
    headers = FORWARDED | {"X-Forwarded-Prefix": prefix}
    assert await link_of(backend, headers) == f"https://images.example.com{prefix.rstrip('/')}"


@pytest.mark.parametrize(
    ("sent", "scheme"),
    [
        ("https", "https"),
        ("https, http", "https"),
        ("https,https", "https"),
        ("HTTPS", "https"),
        ("http, https", "http"),
    ]
    + [(unknown, "http") for unknown in ("", ",", "javascript", "ftp, https")],
)
async def test_links_have_the_scheme_of_the_client_behind_any_number_of_proxies(
    backend: FakeBackend, sent: str, scheme: str
) -> None:
    assert await link_of(backend, FORWARDED | {"X-Forwarded-Proto": sent}) == f"{scheme}://images.example.com/hyper"


async def test_a_proxy_s_prefix_and_another_spelling_of_the_path_go_together(backend: FakeBackend) -> None:
    assert await link_of(backend, FORWARDED, path="/openai/v1") == "https://images.example.com/hyper"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "/",
        "hyper",
        "//evil.example",
        "/a//b",
        "https://evil.example",
        "/a b",
        "/a?b",
        "/a, /b",
        "/%2e%2e",
        "/..",
        "/a/../b",
    ],
)
async def test_what_is_no_prefix_is_ignored(backend: FakeBackend, prefix: str) -> None:
    headers = FORWARDED | {"X-Forwarded-Prefix": prefix}
    assert await link_of(backend, headers) == "https://images.example.com"


async def test_nobody_else_is_believed(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")
    assert await link_of(backend, FORWARDED) == "http://images.example.com"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1,127.0.0.0/8")
    assert await link_of(backend, FORWARDED) == "https://images.example.com/hyper"


async def test_a_public_url_says_all(backend: FakeBackend) -> None:
    assert await link_of(backend, FORWARDED, public_url="https://x.example/y") == "https://x.example/y"
