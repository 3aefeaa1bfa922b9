"""Browser security: response headers, CORS, and an origin check against cross-site requests (CSRF).

Only browsers send an `Origin`: with every POST, and with requests by scripts of other websites.
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

# Defaults for responses that do not set them. HTTPS, and with it HSTS, is the job of a proxy.
_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_NAMES = frozenset(name for name, _ in _HEADERS)
# Response headers that scripts may read.
_EXPOSED = (
    "openai-processing-ms",
    "retry-after",
    "retry-after-ms",
    "server-timing",
    "x-hypergen-generated-size",
    "x-hypergen-estimated-ms",
    "x-hypergen-prompt-truncated",
    "x-hypergen-queue-position",
    "x-request-id",
    "x-should-retry",
)
_ANY = "*"
# Names under these, and names without a dot, are not in public DNS, so an attacker cannot own one.
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")


def security_headers(given: Collection[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """The security headers that are missing from `given`."""
    names = {name for name, _ in given}
    return _HEADERS if names.isdisjoint(_NAMES) else [header for header in _HEADERS if header[0] not in names]


class _Cors(CORSMiddleware):
    """Starlette's CORS middleware with preflight errors in OpenAI's shape instead of plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The response to a preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        rejection = error_response(PreflightError(bytes(response.body).decode()))
        about = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        rejection.headers.update(about)
        return rejection


def cors(origins: Collection[str]) -> list[Middleware]:
    """CORS middleware that lets scripts of `origins` use the API; `*` allows all, as there are no cookies to misuse.

    It belongs outside authentication, as preflights have no key, and outside exception handling, so that scripts can
    read errors.
    """
    if not origins:
        return []
    allowed = [_ANY] if _ANY in origins else list(origins)
    methods = ("GET", "POST", "DELETE")
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
    """Rejects cross-site POST requests, for a server without API keys.

    CORS does not prevent them, as forms need no preflight, nor DNS rebinding, which makes an attacker's website
    same-origin. Neither can know a key, so a server with keys does not need this check.
    """

    def __init__(self, origins: Collection[str], public_url: str | None = None) -> None:
        self._origins = frozenset([*origins, *([] if public_url is None else [_origin_of(public_url)])])

    def __call__(self, scope: Scope) -> None:
        """Raises `CrossSiteError`."""
        if scope["method"] == "POST" and not self._is_allowed(Headers(scope=scope)):
            raise CrossSiteError

    def _is_allowed(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or origin in self._origins or _ANY in self._origins:
            return True
        host = origin.partition("://")[2]
        return host == headers.get("host") and _is_private_host(host)


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _is_private_host(host: str) -> bool:
    """Whether a host, optionally with a port, is an address or a name outside public DNS."""
    name = _without_port(host)
    return bool(name) and ("." not in name or name.endswith(_PRIVATE_NAMES) or _is_address(name))


def _without_port(host: str) -> str:
    """The host name; empty if malformed."""
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
