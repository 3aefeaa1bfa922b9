"""HTTP client for the server under test: paths, headers and request bodies. Does not check responses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

GENERATIONS = "/images/generations"
EDITS = "/images/edits"
VARIATIONS = "/images/variations"
MODELS = "/models"

PROMPT = "a rocket on a yellow background"
# The fields of a body, and a file as httpx takes it: name, content, type.
Fields = Mapping[str, Any]
File = tuple[str, bytes, str]
Files = Sequence[tuple[str, File]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the client."""

    api_key: str | None = None
    timeout: float = 600.0  # seconds for one response
    extra_body: Fields = field(default_factory=dict)  # added to every request for images
    burst: int = 0  # concurrent requests to fill the queue with; 0 leaves the queue alone


class Server:
    """A server with its API at `url`, such as http://localhost:8000/v1 or the same without /v1."""

    def __init__(self, url: str, options: Options, transport: httpx.BaseTransport | None = None) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.root = self.url.removesuffix("/v1")
        self.options = options
        # One connection per request, so that an invalid request cannot affect the next one.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(timeout=options.timeout, transport=transport, limits=limits)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, method: str, path: str, *, authorised: bool = True, **content: Any) -> httpx.Response:
        """Send a request. `path` is relative to the API unless it is a URL."""
        key = self.options.api_key if authorised else None
        headers = ({} if key is None else {"Authorization": f"Bearer {key}"}) | content.pop("headers", {})
        url = path if "://" in path else f"{self.url}{path}"
        return self._http.request(method, url, headers=headers, **content)

    def generate(self, **fields: Any) -> httpx.Response:
        """Request images, of `PROMPT` by default; None leaves a field out."""
        return self.send("POST", GENERATIONS, json=self.body(fields))

    def edit(self, files: Files, path: str = EDITS, **fields: Any) -> httpx.Response:
        """Send a form with files, as OpenAI's clients do."""
        body = self.body({"prompt": None} | fields if path == VARIATIONS else fields)
        return self.send("POST", path, data={name: as_text(value) for name, value in body.items()}, files=files)

    def body(self, fields: Fields) -> dict[str, Any]:
        """Model, prompt, `extra_body` and `fields` of a request; later ones take precedence, None removes a field."""
        everything = {"model": self.model_id, "prompt": PROMPT, **self.options.extra_body, **fields}
        return {name: value for name, value in everything.items() if value is not None}

    @functools.cached_property
    def model_id(self) -> str | None:
        """The id of the first listed model; None if there is none."""
        try:
            models = self.send("GET", MODELS).json()["data"]
            return str(models[0]["id"])
        except (ValueError, LookupError, TypeError):
            return None

    @functools.cached_property
    def image(self) -> httpx.Response:
        """The response to a prompt without other fields; shared by several rules."""
        return self.generate()

    @functools.cached_property
    def stream(self) -> httpx.Response:
        """The complete response to a streaming request with two previews."""
        return self.generate(stream=True, partial_images=2)


def as_text(value: object) -> str:
    """A value as OpenAI's clients encode it in a form."""
    return str(value).lower() if isinstance(value, bool) else str(value)
