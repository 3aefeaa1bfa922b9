"""What browsers are told and asked: headers that keep answers to themselves, and which other websites may use the API.

Programs send no `Origin` and see no difference. Browsers send one with every POST, and with whatever a script of
another website asks for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

from hypergen_gateway.errors import CrossSiteError, PreflightError
from hypergen_gateway.http.exceptions import error_response

# On every answer that does not say otherwise itself. HTTPS, and so HSTS, is the proxy's that brings it.
_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_NAMES = frozenset(name for name, _ in _HEADERS)
# What scripts may read of an answer beside its body.
_EXPOSED = (
    "openai-processing-ms",
    "retry-after",
    "retry-after-ms",
    "server-timing",
    "x-hypergen-drawn-size",
    "x-hypergen-estimated-ms",
    "x-hypergen-prompt-truncated",
    "x-hypergen-queue-position",
    "x-request-id",
    "x-should-retry",
)
_ANY = "*"
# Under these, and for names without a dot, no stranger can have a name that leads to this machine.
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")


def security_headers(given: Collection[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """What browsers need to be told beside what an answer says itself."""
    names = {name for name, _ in given}
    return _HEADERS if names.isdisjoint(_NAMES) else [header for header in _HEADERS if header[0] not in names]


class _Cors(CORSMiddleware):
    """Starlette's, which refuses in plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser is told before it sends a request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = error_response(PreflightError(bytes(response.body).decode()))
        about = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        refusal.headers.update(about)
        return refusal


def cors(origins: Collection[str]) -> list[Middleware]:
    """Lets scripts of these websites use the API, `*` those of all; there are no cookies that they could misuse.

    It answers preflights, which come without a key, and belongs around whatever answers errors, which scripts read too.
    """
    if not origins:
        return []
    allowed = [_ANY] if _ANY in origins else list(origins)
    methods = ("GET", "POST")
    return [
        Middleware(
            _Cors,
            allow_origins=allowed,
            allow_methods=methods,
            allow_headers=[_ANY],
            expose_headers=_EXPOSED,
        )
    ]


class OriginCheck:
    """Refuses what a website has a visitor's browser POST to a server that asks for no key.

    A form needs no preflight, so CORS does not keep one away; and a name that a stranger points at this machine makes
    his website the server's own. Where a key is needed, neither has it.
    """

    def __init__(self, origins: Collection[str], public_url: str | None = None) -> None:
        self._origins = frozenset([*origins, *([] if public_url is None else [_origin_of(public_url)])])

    def __call__(self, scope: Scope) -> None:
        """Raises `CrossSiteError`."""
        if scope["method"] == "POST" and not self._may_ask(Headers(scope=scope)):
            raise CrossSiteError

    def _may_ask(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or origin in self._origins or _ANY in self._origins:
            return True
        host = origin.partition("://")[2]
        return host == headers.get("host") and _cannot_be_a_stranger_s(host)


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _cannot_be_a_stranger_s(host: str) -> bool:
    """Whether a host, perhaps with a port, is an address or has a name that is in no public DNS."""
    name = _without_port(host)
    return bool(name) and ("." not in name or name.endswith(_PRIVATE_NAMES) or _is_address(name))


def _without_port(host: str) -> str:
    """Empty for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
