"""Request headers that describe the client: credentials, `Idempotency-Key`, and the retry counter, time-outs and
version that OpenAI's clients send.
"""

from __future__ import annotations

import hashlib
import math
import re

from starlette.datastructures import Headers

from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.request import Client
from hypergen_gateway.http.keys import presented_key

_LEGAL_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# OpenAI's Python client sends the seconds until the next byte, the one for Node those until the response begins.
_TIMEOUT_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
# OpenAI's own before Python 1.0 and Node 4.0, when every model answered with links by default.
_EXPECT_LINKS = re.compile(r"OpenAI/(v1 PythonBindings/0|NodeJS/[1-3])\.")


def read_client(headers: Headers) -> Client:
    """The client as the headers describe it.

    Raises:
        InvalidRequestError: the idempotency key is malformed. Malformed hints are ignored.
    """
    key = headers.get("idempotency-key")
    if key is not None and not _LEGAL_KEY.fullmatch(key):
        raise InvalidRequestError("An Idempotency-Key must be 1 to 255 visible ASCII characters.")
    retries = headers.get("x-stainless-retry-count")
    return Client(
        owner=hashlib.sha256(presented_key(headers.raw) or b"").hexdigest(),
        idempotency_key=key,
        is_retry=retries is not None and retries.isdecimal() and int(retries[:9]) > 0,
        may_return=key is not None or retries is not None,
        read_timeout=_read_timeout(headers),
        expects_links=_EXPECT_LINKS.match(headers.get("user-agent", "")) is not None,
    )


def _read_timeout(headers: Headers) -> float | None:
    for name in _TIMEOUT_HEADERS:
        try:
            seconds = float(headers.get(name, ""))
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return None
