"""Who asks, and how patient they are: what a request's headers say beside its body.

Knows `Idempotency-Key`, and the headers by which OpenAI's clients tell that they try again and how long they wait.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np
from starlette.datastructures import Headers

from hypergen_gateway.api.fields import PictureRequest
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.generation.jobs import RequestIdentity
from hypergen_gateway.generation.service import Order
from hypergen_gateway.http.keys import presented_key

_SANE_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# OpenAI's Python client names the seconds until the next byte, the one for Node those until the answer begins.
_PATIENCE = ("x-stainless-read-timeout", "x-stainless-timeout")
# OpenAI's own before Python 1.0 and Node 4.0, when there was no model yet that answers in base64 by itself.
_READ_LINKS = re.compile(r"OpenAI/(v1 PythonBindings/0|NodeJS/[1-3])\.")
# Fields that hold files; what is in them is read from the order's pixels.
_FILES = {"image", "images", "mask"}


@dataclass(frozen=True, kw_only=True)
class ClientHints:
    """The client of one request.

    `owner` stands for its credentials without telling them; `patience` is how many seconds it waits for something to
    come, None if it does not say; `reads_links` tells that it is too old to expect base64 that it did not ask for.
    """

    owner: str
    idempotency_key: str | None
    is_retry: bool
    may_return: bool
    patience: float | None
    reads_links: bool


def read_client_hints(headers: Headers) -> ClientHints:
    """The caller as the headers tell.

    Raises:
        InvalidRequestError: the idempotency key is not one. What a client says of itself by the way is never refused.
    """
    key = headers.get("idempotency-key")
    if key is not None and not _SANE_KEY.fullmatch(key):
        raise InvalidRequestError("An Idempotency-Key must be of 1 to 255 visible ASCII characters.")
    retries = headers.get("x-stainless-retry-count")
    return ClientHints(
        owner=hashlib.sha256(presented_key(headers.raw) or b"").hexdigest(),
        idempotency_key=key,
        is_retry=retries is not None and retries.isdecimal() and int(retries[:9]) > 0,
        may_return=key is not None or retries is not None,
        patience=_seconds(headers),
        reads_links=_READ_LINKS.match(headers.get("user-agent", "")) is not None,
    )


def deadline_of(wanted: PictureRequest, caller: ClientHints) -> float | None:
    """Within how many seconds the pictures are wanted; None: there is no such limit.

    A client's patience is one unless it gets a stream, whose heartbeats keep it waiting.
    """
    given = None if wanted.deadline_ms is None else wanted.deadline_ms / 1000
    patience = None if wanted.stream else caller.patience
    return min((limit for limit in (given, patience) if limit is not None), default=None)


def identify_request(caller: ClientHints, route: str, wanted: PictureRequest, order: Order) -> RequestIdentity:
    """What tells whether a request is asked again. Reads every pixel that came with it: many belong in a thread."""
    return RequestIdentity(
        owner=caller.owner,
        fingerprint=_fingerprint(route, wanted, order) if caller.may_return else "",
        idempotency_key=caller.idempotency_key,
        is_retry=caller.is_retry,
        may_return=caller.may_return,
    )


def _fingerprint(route: str, wanted: PictureRequest, order: Order) -> str:
    """A digest of what was read, not of the body: a form's boundary is another one in every request."""
    digest = hashlib.sha256(f"{route}\n{wanted.model_dump_json(exclude=_FILES)}".encode())
    for part in order.parts:
        arrays = [part.generation.image, part.generation.mask]
        if part.retouch is not None:  # what the client gets of it, in a size that the model need not see
            digest.update(repr(part.retouch.size).encode())
            arrays += [part.retouch.kept, part.retouch.mask]
        for pixels in arrays:
            if pixels is not None:
                digest.update(repr(pixels.shape).encode())
                digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _seconds(headers: Headers) -> float | None:
    for name in _PATIENCE:
        try:
            seconds = float(headers.get(name, ""))
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return None
