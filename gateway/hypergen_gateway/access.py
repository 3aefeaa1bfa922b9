"""Who may ask: whoever carries a key; where none is needed, everybody but other websites in a visitor's browser."""

from __future__ import annotations

from collections.abc import Container

from starlette.types import Scope

from hypergen_gateway.errors import AuthenticationError
from hypergen_gateway.keys import Key, Keys
from hypergen_gateway.links import FILES_PATH
from hypergen_gateway.playground import FILES_PREFIX, PAGE_PATH

PROBE_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
METRICS_PATH = "/metrics"
# Probes come without a key, and so do the page, which asks for one, and whoever wants to read how to use one.
OPEN_PATHS = PROBE_PATHS | {"/openapi.json", "/docs", PAGE_PATH}
# A link is a key of its own; the page's files are everybody's.
_OPEN_PREFIXES = (f"{FILES_PATH}/", FILES_PREFIX)


class ApiKey:
    """Lets a request through that carries a key or goes to an open path; where there are no keys, every request."""

    def __init__(self, keys: Keys, open_paths: Container[str] = OPEN_PATHS) -> None:
        self._open_paths = open_paths
        self._keys = keys

    def __call__(self, scope: Scope) -> None:
        """Raises `AuthenticationError`; else notes the key's name, if it has one."""
        if self._keys and not self._is_open(scope["path"]):
            key = self._check([value for name, value in scope["headers"] if name == b"authorization"])
            if key.name is not None:
                scope.setdefault("state", {})["key_name"] = key.name

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or path.startswith(_OPEN_PREFIXES)

    def _check(self, given: list[bytes]) -> Key:
        if not given:
            raise AuthenticationError("No API key was given. Send it in the header 'Authorization: Bearer KEY'.")
        scheme, _, key = given[0].partition(b" ")
        if len(given) > 1 or scheme != b"Bearer" or not key.strip():
            raise AuthenticationError("The Authorization header is malformed. It must read 'Bearer KEY'.")
        found = self._keys.find(key)
        if found is None:
            raise AuthenticationError("The API key is wrong.")
        return found
