"""Paths: the one that a route has, and the others under which clients ask for it.

Everything behind `CanonicalPath` knows a route by its own path alone: who may ask, what a body may weigh, what log and
metrics call it.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile(r"/{2,}")
# What Azure's clients put before a route: they name the model there, which we have but one of.
_AZURE = re.compile(r"/openai/(?:deployments/.+/(?=(?:images|models|chat|completions|embeddings|audio)(?:/|$))|v1/)?")

_OURS = re.compile(r"/(images/(?:generations|edits|variations)|models|capabilities)(?=/|$)")
_NOT_OURS = re.compile(r"/(?:chat/completions|completions|responses|embeddings|audio|moderations|realtime)(?=/|$)")


def canonical_path(path: str) -> str:
    """The path of the route that is meant: without doubled and trailing slashes, and without Azure's prefixes.

    Clients join base URLs and routes as they like; a redirect would lose their bodies.
    """
    path = _SLASHES.sub("/", path)
    azure = _AZURE.match(path)
    if azure is not None:
        path = f"/v1/{path[azure.end() :]}"
    return path.rstrip("/") or "/"


def same_id(one: str, other: str) -> bool:
    """Whether two models' ids are the same but for what a URL does not keep of a local path, such as "./" before it."""
    return _segments(one) == _segments(other)


def _segments(id_: str) -> list[str]:
    return [segment for segment in id_.split("/") if segment not in ("", ".")]


def hint_for(path: str) -> str:
    """Where to ask instead of a path that is no route; empty where nobody can tell."""
    if ours := _OURS.search(path):
        return f" Use /v1/{ours[1]}: a client's base URL ends in /v1."
    if _NOT_OURS.search(path):
        return " This server makes images and nothing else: use /v1/images/generations."
    return ""


class CanonicalPath:
    """Gives every request the path of the route that it means."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = canonical_path(scope["path"])
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self._app(scope, receive, send)
