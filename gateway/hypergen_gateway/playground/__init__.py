"""The page at `/`: static files of the package, served with headers that isolate it from other sites."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.staticfiles import StaticFiles

# Served without an API key; the page asks the user for it.
PAGE_PATH = "/"
FILES_PREFIX = "/web/"

FOLDER = Path(__file__).parent / "web"
HEADERS = {
    # No content from other origins, no inline scripts or styles, no HTML from strings; images are blobs of the page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Revalidated on each load (304 until an update), so that all files of a page are of one version.
    "Cache-Control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """Routes of the page and its files."""
    files = StaticFiles(directory=FOLDER)

    async def page(request: Request) -> Response:
        return await _respond(files, "index.html", request)

    async def file(request: Request) -> Response:
        return await _respond(files, request.path_params["name"], request)

    return [Route(PAGE_PATH, page), Route(f"{FILES_PREFIX}{{name}}", file)]


async def _respond(files: StaticFiles, name: str, request: Request) -> Response:
    response = await files.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response
