"""Translation of exceptions into API errors, error responses and log lines."""

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
    """The API error for an exception."""
    if isinstance(error, HyperGenError):
        return error
    if isinstance(error, ClientDisconnect):
        return ClientClosedRequestError("The client closed the request.")
    if isinstance(error, HTTPException) and error.status_code < 500:
        return InvalidRequestError(HTTPStatus(error.status_code).phrase)
    api_error = _exhaustion(error) if isinstance(error, OSError) else None
    if api_error is not None:
        api_error.__cause__ = error
        return api_error
    return InternalError(f"unexpected {type(error).__name__}")


def _exhaustion(error: OSError) -> HyperGenError | None:
    """The API error for a full disk or too many open files, which any upload or link can cause."""
    if error.errno in _DISK_FULL:
        return StorageFullError("The server's disk is full. Try again later.")
    if error.errno in _NO_FILE:
        return UnavailableError("The server has too many files open. Try again in a moment.")
    return None


def error_response(error: HyperGenError) -> Response:
    """The HTTP response for an API error."""
    return JSONResponse(error.body, status_code=error.status, headers=dict(error.headers))


def forget_tracebacks(error: BaseException) -> None:
    """Drop the traceback of an error that has been answered, and those of its causes.

    A task keeps its error, whose traceback leads to the task's own frames: a cycle, in which the images of a request
    would stay in memory until the garbage collector runs.
    """
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            chain += [each.__cause__, each.__context__]


def log_exception(api_error: HyperGenError, error: Exception) -> None:
    """Log the cause of a server error, which the client does not see. Client errors are not logged."""
    request_id = current_request_id.get()
    if isinstance(api_error, InternalError):
        logger.error("request %s failed: %s", request_id, api_error, exc_info=error)
    elif api_error.status >= 500:
        cause = " ".join(str(api_error.__cause__ or "no cause").split())  # gRPC's messages span several lines
        logger.warning("request %s: %s (%s)", request_id, api_error, cause)
