"""`X-Forwarded-…` headers of trusted proxies.

Proxies are trusted by address, as set in `FORWARDED_ALLOW_IPS` (as in uvicorn); the default is this machine.
"""

from __future__ import annotations

import os
import re
from typing import Any

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from hypergen_gateway.http.request_id import find_header

_THIS_MACHINE = "127.0.0.1,::1,::ffff:127.0.0.1"
_PREFIX = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")


class TrustedProxies(ProxyHeadersMiddleware):
    """uvicorn's middleware for scheme and client, extended by `X-Forwarded-Prefix`, the path prefix of this server."""

    def __init__(self, app: Any) -> None:
        super().__init__(app, os.environ.get("FORWARDED_ALLOW_IPS", _THIS_MACHINE))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (scope.get("client") or ("",))[0] in self.trusted_hosts:
            # Behind several proxies it may be a list, `https, http`, of which the first is how the client connected.
            scheme = (find_header(scope["headers"], b"x-forwarded-proto") or "").partition(",")[0].strip().lower()
            if scheme in ("http", "https"):
                scope["scheme"] = scheme
            prefix = (find_header(scope["headers"], b"x-forwarded-prefix") or "").rstrip("/")
            if _PREFIX.fullmatch(prefix):
                scope["app_root_path"] = prefix  # Starlette adds it to base URLs, not to paths
        await super().__call__(scope, receive, send)
