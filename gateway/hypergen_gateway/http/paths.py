"""Normalisation of request paths.

Inside `CanonicalPath` each route has one path, so authentication, body limits, logs and metrics agree on it.
"""

from __future__ import annotations

import difflib
import re
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile(r"/{2,}")
# Prefixes of Azure's clients, which contain a model name; there is only one model here.
_AZURE = re.compile(r"/openai/(?:deployments/.+/(?=(?:images|models|chat|completions|embeddings|audio)(?:/|$))|v1/)?")

_OURS = re.compile(r"/(images/(?:generations|edits|variations)|models|capabilities)(?=/|$)")
_NOT_OURS = re.compile(r"/(?:chat/completions|completions|responses|embeddings|audio|moderations|realtime)(?=/|$)")
# Suggested for paths that are nearly one of them.
ROUTES = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/models",
    "/v1/capabilities",
    "/v1/loras",
    "/health",
    "/metrics",
)
# By difflib's measure: /v1/images/generate has 0.88, and /v1/files 0.63 to /v1/models.
_SIMILARITY = 0.8


def canonical_path(path: str) -> str:
    """A path without duplicate and trailing slashes and without Azure's prefixes.

    Clients differ in how they join base URLs and routes, and a redirect would lose the body.
    """
    path = _SLASHES.sub("/", path)
    azure = _AZURE.match(path)
    if azure is not None:
        path = f"/v1/{path[azure.end() :]}"
    return path.rstrip("/") or "/"


def same_id(one: str, other: str) -> bool:
    """Whether two model ids are equal except for parts of a local path that URLs drop, such as a leading "./"."""
    return _segments(one) == _segments(other)


def _segments(id_: str) -> list[str]:
    return [segment for segment in id_.split("/") if segment not in ("", ".")]


def hint_for(path: str) -> str:
    """A hint at the right path for one that was not found; empty if unknown."""
    if match := _OURS.search(path):
        return f" Use /v1/{match[1]}: a client's base URL must end in /v1."
    if _NOT_OURS.search(path):
        return " This server only generates images: use /v1/images/generations."
    similar = difflib.get_close_matches(path.lower(), ROUTES, n=1, cutoff=_SIMILARITY)
    return f" Did you mean {similar[0]}?" if similar else ""


class CanonicalPath:
    """Replaces the path of each request by its canonical form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = canonical_path(scope["path"])
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self._app(scope, receive, send)
