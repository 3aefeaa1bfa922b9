"""Exceptions that nobody wrote for a client: which error they become, and what client and log are told."""

from __future__ import annotations

import errno
import logging
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from hypergen_gateway.errors import (
    ClientClosedRequestError,
    HyperGenError,
    InternalError,
    InvalidRequestError,
    StorageFullError,
    UnavailableError,
)
from hypergen_gateway.http.request_id import current_request_id

logger = logging.getLogger(__name__)

_NO_FILE = (errno.EMFILE, errno.ENFILE)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def to_api_error(error: Exception) -> HyperGenError:
    """The error that a client sees."""
    if isinstance(error, HyperGenError):
        return error
    if isinstance(error, ClientDisconnect):
        return ClientClosedRequestError("The client closed the request.")
    if isinstance(error, HTTPException) and error.status_code < 500:
        return InvalidRequestError(HTTPStatus(error.status_code).phrase)
    ours = _exhaustion(error) if isinstance(error, OSError) else None
    if ours is not None:
        ours.__cause__ = error
        return ours
    return InternalError(f"unexpected {type(error).__name__}")


def _exhaustion(error: OSError) -> HyperGenError | None:
    """Wherever a file is wanted, for an upload or a link: there is no room for it, or no handle."""
    if error.errno in _DISK_FULL:
        return StorageFullError("The server's disk is full: this cannot be kept. Try again later.")
    if error.errno in _NO_FILE:
        return UnavailableError("The server has too many files open. Try again in a moment.")
    return None


def error_response(error: HyperGenError) -> Response:
    """An error as an HTTP response."""
    return JSONResponse(error.body, status_code=error.status, headers=dict(error.headers))


def log_exception(ours: HyperGenError, error: Exception) -> None:
    """Writes down what a client is not told; nothing where the client is the one to act."""
    request_id = current_request_id.get()
    if isinstance(ours, InternalError):
        logger.error("request %s failed: %s", request_id, ours, exc_info=error)
    elif ours.status >= 500:
        cause = " ".join(str(ours.__cause__ or "no cause").split())  # gRPC's span lines
        logger.warning("request %s: %s (%s)", request_id, ours, cause)
