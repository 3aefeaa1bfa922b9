"""API key authentication."""

from __future__ import annotations

from collections.abc import Container

from starlette.types import Scope

from hypergen_gateway.errors import AuthenticationError
from hypergen_gateway.http.keys import Key, Keys, presented_key
from hypergen_gateway.http.request_id import RawHeaders

PROBE_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
METRICS_PATH = "/metrics"


class ApiKey:
    """Requires a valid API key, except on open paths or if no keys are configured.

    A path is open if it is one of `open_paths` or starts with one of `open_prefixes`.
    """

    def __init__(self, keys: Keys, open_paths: Container[str], open_prefixes: tuple[str, ...]) -> None:
        self._keys = keys
        self._open_paths = open_paths
        self._open_prefixes = open_prefixes

    def __call__(self, scope: Scope) -> None:
        """Raise `AuthenticationError`, or record the key's name for the log."""
        path = scope["path"]
        is_open = path in self._open_paths or path.startswith(self._open_prefixes)
        if self._keys and not is_open:
            key = self._check(scope["headers"])
            if key.name is not None:
                scope.setdefault("state", {})["key_name"] = key.name

    def _check(self, headers: RawHeaders) -> Key:
        given = presented_key(headers)
        if given is None:
            raise AuthenticationError("Missing API key. Send it in the header 'Authorization: Bearer KEY'.")
        if not given:
            raise AuthenticationError(
                "The header with the API key is malformed. It must be 'Authorization: Bearer KEY' or 'api-key: KEY'."
            )
        found = self._keys.find(given)
        if found is None:
            raise AuthenticationError("Incorrect API key.")
        return found
