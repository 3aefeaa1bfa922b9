"""The server under test, as a client sees it. Knows paths, headers and how to ask; judges nothing."""

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
# What a body field may hold, or a file as httpx wants it: name, content, type.
Fields = Mapping[str, Any]
File = tuple[str, bytes, str]
Files = Sequence[tuple[str, File]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to ask."""

    api_key: str | None = None
    timeout: float = 600.0  # seconds for one answer
    extra_body: Fields = field(default_factory=dict)  # goes into every request for pictures
    burst: int = 0  # requests at once to fill the queue with; 0: the queue is left alone


class Server:
    """A server with its API at `url`, such as http://localhost:8000/v1 or the same without /v1."""

    def __init__(self, url: str, options: Options, transport: httpx.BaseTransport | None = None) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.root = self.url.removesuffix("/v1")
        self.options = options
        # A connection for each request: what is done to one must not be the next one's fault.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(timeout=options.timeout, transport=transport, limits=limits)

    def close(self) -> None:
        """Gives back connections."""
        self._http.close()

    def send(self, method: str, path: str, *, authorised: bool = True, **content: Any) -> httpx.Response:
        """The answer to a request; a path that is a URL is asked as it is."""
        headers = {**(self._key() if authorised else {}), **content.pop("headers", {})}
        url = path if "://" in path else f"{self.url}{path}"
        return self._http.request(method, url, headers=headers, **content)

    def generate(self, **fields: Any) -> httpx.Response:
        """The answer to a request for pictures of `PROMPT`, unless another is given; None leaves a field out."""
        return self.send("POST", GENERATIONS, json=self.body(fields))

    def edit(self, files: Files, path: str = EDITS, **fields: Any) -> httpx.Response:
        """The answer to a form with files, as OpenAI's clients send one."""
        body = self.body({"prompt": None} | fields if path == VARIATIONS else fields)
        return self.send("POST", path, data={name: as_text(value) for name, value in body.items()}, files=files)

    def body(self, fields: Fields) -> dict[str, Any]:
        """A request's fields: the model that is listed, what every request is to hold, and these."""
        everything = {"model": self.model_id, "prompt": PROMPT, **self.options.extra_body, **fields}
        return {name: value for name, value in everything.items() if value is not None}

    @functools.cached_property
    def model_id(self) -> str | None:
        """The first model of the list; None where there is none."""
        try:
            models = self.send("GET", MODELS).json()["data"]
            return str(models[0]["id"])
        except (ValueError, LookupError, TypeError):
            return None

    @functools.cached_property
    def picture(self) -> httpx.Response:
        """The answer to a prompt alone: several rules look at it."""
        return self.generate()

    @functools.cached_property
    def stream(self) -> httpx.Response:
        """A stream with two previews, whole."""
        return self.generate(stream=True, partial_images=2)

    def _key(self) -> dict[str, str]:
        return {} if self.options.api_key is None else {"Authorization": f"Bearer {self.options.api_key}"}


def as_text(value: object) -> str:
    """A value as OpenAI's clients write it into a form."""
    return str(value).lower() if isinstance(value, bool) else str(value)
